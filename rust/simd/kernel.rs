//! The bodies: what is computed, once, for every format and every instruction set.
//!
//! Kernels borrow and never allocate. They run over at most [`MICRO`] elements at a time, so that everything they touch stays
//! in the first-level cache, and because the order of the sums is part of the result: lane `j` of [`LANES`] takes
//! elements `j, j + 16, ...`, and the lanes join pairwise.

use crate::bf16::{Element, Work};

/// Elements that one call handles, and the unit in which sums are made.
pub const MICRO: usize = 4096;
/// Partial sums per MICRO.
pub const LANES: usize = 16;

/// How the realised change of a tensor compares with the intended one (design section 3.4).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rounding {
    /// Sum of `u * u`, with `u` the intended update.
    pub intended: f64,
    /// Sum of `r * r`, with `r` the difference of output and target.
    pub realised: f64,
    /// Sum of `u * r`.
    pub dot: f64,
    /// Elements with `u != 0`.
    pub updated: u64,
    /// Of those, the ones whose output equals the target.
    pub lost: u64,
}

impl Rounding {
    /// Adds the sums of what follows.
    pub fn join(&mut self, next: &Self) {
        self.intended += next.intended;
        self.realised += next.realised;
        self.dot += next.dot;
        self.updated += next.updated;
        self.lost += next.lost;
    }
}

#[inline(always)]
fn join_lanes(mut lanes: [f64; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn elements<E: Element>(bytes: &[u8]) -> impl Iterator<Item = E> + '_ {
    bytes.chunks_exact(E::SIZE).map(E::load)
}

/// `into = widen(from)`.
#[inline(always)]
pub fn widen<E: Element, W: Work>(into: &mut [W], from: &[u8]) {
    for (w, e) in into.iter_mut().zip(elements::<E>(from)) {
        *w = W::widen(e);
    }
}

/// `acc = c * v`, or `acc + c * v` when not `first`.
#[inline(always)]
pub fn scaled<E: Element, W: Work>(acc: &mut [W], v: &[u8], c: W, first: bool) {
    if first {
        for (a, v) in acc.iter_mut().zip(elements::<E>(v)) {
            *a = c * W::widen(v);
        }
    } else {
        for (a, v) in acc.iter_mut().zip(elements::<E>(v)) {
            *a = *a + c * W::widen(v);
        }
    }
}

/// `acc = c * v`, or `acc + c * v`, for elements that are already widened.
#[inline(always)]
pub fn scaled_work<W: Work>(acc: &mut [W], v: &[W], c: W, first: bool) {
    if first {
        for (a, &v) in acc.iter_mut().zip(v) {
            *a = c * v;
        }
    } else {
        for (a, &v) in acc.iter_mut().zip(v) {
            *a = *a + c * v;
        }
    }
}

/// `acc = c * (p - n)`, or `acc + c * (p - n)`: the difference first, then the scale, then the sum.
#[inline(always)]
pub fn difference<E: Element, W: Work>(acc: &mut [W], p: &[u8], n: &[u8], c: W, first: bool) {
    let pairs = elements::<E>(p).zip(elements::<E>(n));
    if first {
        for (a, (p, n)) in acc.iter_mut().zip(pairs) {
            *a = c * (W::widen(p) - W::widen(n));
        }
    } else {
        for (a, (p, n)) in acc.iter_mut().zip(pairs) {
            *a = *a + c * (W::widen(p) - W::widen(n));
        }
    }
}

/// `acc = acc - n`, for donors of different formats.
#[inline(always)]
pub fn subtract<E: Element, W: Work>(acc: &mut [W], n: &[u8]) {
    for (a, n) in acc.iter_mut().zip(elements::<E>(n)) {
        *a = *a - W::widen(n);
    }
}

/// `out = round(t + u)`, and the target's own bits where `u` is zero. Whether all results are finite.
#[inline(always)]
pub fn finish<E: Element, W: Work>(out: &mut [u8], t: &[u8], u: &[W]) -> bool {
    let mut finite = true;
    for ((o, t), &u) in out.chunks_exact_mut(E::SIZE).zip(elements::<E>(t)).zip(u) {
        let sum = (W::widen(t) + u).narrow::<E>();
        let value = if u == W::ZERO { t } else { sum };
        finite &= value.finite();
        value.store(o);
    }
    finite
}

/// [`finish`] into another format, from a target that is already widened.
#[inline(always)]
pub fn finish_as<O: Element, W: Work>(out: &mut [u8], t: &[W], u: &[W]) -> bool {
    let mut finite = true;
    for ((o, &t), &u) in out.chunks_exact_mut(O::SIZE).zip(t).zip(u) {
        let value = (if u == W::ZERO { t } else { t + u }).narrow::<O>();
        finite &= value.finite();
        value.store(o);
    }
    finite
}

/// The rounding report of at most MICRO elements; `t` is the target, widened.
#[inline(always)]
pub fn rounding<O: Element, W: Work>(t: &[W], out: &[u8], u: &[W]) -> Rounding {
    let mut intended = [0.0; LANES];
    let mut realised = [0.0; LANES];
    let mut dot = [0.0; LANES];
    let mut updated = [0u32; LANES];
    let mut lost = [0u32; LANES];
    let mut step = |j: usize, t: W, o: W, u: W| {
        let (u64_, r) = (u.to_f64(), o.to_f64() - t.to_f64());
        intended[j] += u64_ * u64_;
        realised[j] += r * r;
        dot[j] += u64_ * r;
        let moves = u != W::ZERO;
        updated[j] += u32::from(moves);
        lost[j] += u32::from(moves & (o == t));
    };
    let whole = u.len() / LANES * LANES;
    for ((t, o), u) in
        t.chunks_exact(LANES).zip(out.chunks_exact(LANES * O::SIZE)).zip(u.chunks_exact(LANES))
    {
        for j in 0..LANES {
            step(j, t[j], W::widen(O::load(&o[j * O::SIZE..(j + 1) * O::SIZE])), u[j]);
        }
    }
    for i in whole..u.len() {
        step(i - whole, t[i], W::widen(O::load(&out[i * O::SIZE..(i + 1) * O::SIZE])), u[i]);
    }
    Rounding {
        intended: join_lanes(intended),
        realised: join_lanes(realised),
        dot: join_lanes(dot),
        updated: updated.iter().map(|&n| u64::from(n)).sum(),
        lost: lost.iter().map(|&n| u64::from(n)).sum(),
    }
}

/// Sum of `a * b` over at most MICRO elements, in f64.
#[inline(always)]
pub fn dot<W: Work>(a: &[W], b: &[W]) -> f64 {
    let mut lanes = [0.0; LANES];
    let whole = a.len() / LANES * LANES;
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for j in 0..LANES {
            lanes[j] += a[j].to_f64() * b[j].to_f64();
        }
    }
    for i in whole..a.len() {
        lanes[i - whole] += a[i].to_f64() * b[i].to_f64();
    }
    join_lanes(lanes)
}

/// The largest |x|, the number of non-zero elements, and whether all are finite.
#[inline(always)]
pub fn extent<W: Work>(x: &[W]) -> (W, u64, bool) {
    let mut largest = [W::ZERO; LANES];
    let mut moved = [0u32; LANES];
    let mut finite = [true; LANES];
    let mut step = |j: usize, x: W| {
        let a = x.abs();
        largest[j] = if a > largest[j] { a } else { largest[j] };
        moved[j] += u32::from(x != W::ZERO);
        finite[j] &= x.is_finite();
    };
    let whole = x.len() / LANES * LANES;
    for x in x.chunks_exact(LANES) {
        for j in 0..LANES {
            step(j, x[j]);
        }
    }
    for i in whole..x.len() {
        step(i - whole, x[i]);
    }
    let max = largest.iter().fold(W::ZERO, |m, &a| if a > m { a } else { m });
    (max, moved.iter().map(|&n| u64::from(n)).sum(), finite.iter().all(|&f| f))
}

/// How many positions both moved, and how many of those in the same direction.
#[inline(always)]
pub fn agreement<W: Work>(a: &[W], b: &[W]) -> (u64, u64) {
    let mut both = 0u32;
    let mut agree = 0u32;
    for (&a, &b) in a.iter().zip(b) {
        let moved = (a != W::ZERO) & (b != W::ZERO);
        both += u32::from(moved);
        agree += u32::from(moved & ((a > W::ZERO) == (b > W::ZERO)));
    }
    (u64::from(both), u64::from(agree))
}

/// Writes one bit per element, set where it is not zero (bit `i % 8` of byte `i / 8`); the number of set bits.
#[inline(always)]
pub fn bitmap<W: Work>(bits: &mut [u8], u: &[W]) -> u64 {
    let mut count = 0u32;
    let mut chunks = u.chunks_exact(8);
    for (byte, u) in bits.iter_mut().zip(&mut chunks) {
        let mut b = 0u8;
        for (j, &u) in u.iter().enumerate() {
            b |= u8::from(u != W::ZERO) << j;
        }
        *byte = b;
        count += b.count_ones();
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        let mut b = 0u8;
        for (j, &u) in rest.iter().enumerate() {
            b |= u8::from(u != W::ZERO) << j;
        }
        bits[u.len() / 8] = b;
        count += b.count_ones();
    }
    u64::from(count)
}

/// Normal deviates `from..from + into.len()` of a generator, times `scale`.
#[inline(always)]
pub fn normal<W: Work>(into: &mut [W], generator: crate::philox::Philox, from: u64, scale: f64) {
    let mut i = from;
    let mut into = into.iter_mut();
    if i % 2 == 1 {
        if let Some(w) = into.next() {
            *w = W::from_f64(generator.normal_pair(i / 2)[1] * scale);
        }
        i += 1;
    }
    while let Some(w) = into.next() {
        let [even, odd] = generator.normal_pair(i / 2);
        *w = W::from_f64(even * scale);
        if let Some(w) = into.next() {
            *w = W::from_f64(odd * scale);
        }
        i += 2;
    }
}
