//! The bodies: what is computed, once, for every format and every instruction set.
//!
//! Kernels borrow and never allocate. They run over at most [`MICRO`] elements at a time, so that everything they touch stays
//! in the first-level cache, and because the order of the sums is part of the result (see [`dot`]).
//!
//! One loop does one simple thing: that is what compilers turn into vector code, and what comes from the first-level cache costs nothing.

use crate::bf16::{Element, Work};

/// Elements that one call handles, and the unit in which sums are made.
pub const MICRO: usize = 4096;
/// Partial sums.
const LANES: usize = 16;
/// Elements that they take at a time.
const GROUP: usize = 4 * LANES;

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

/// Adds the products of a group to the lanes.
#[inline(always)]
fn add_products<W: Work>(lanes: &mut [f64; LANES], a: &[W; GROUP], b: &[W; GROUP]) {
    let mut fours = [W::ZERO; LANES];
    for j in 0..LANES {
        let first = a[j] * b[j] + a[j + LANES] * b[j + LANES];
        let second = a[j + 2 * LANES] * b[j + 2 * LANES] + a[j + 3 * LANES] * b[j + 3 * LANES];
        fours[j] = first + second;
    }
    for j in 0..LANES {
        lanes[j] += fours[j].to_f64();
    }
}

/// The last group, filled up with zeros, whose products change no sum.
#[inline(always)]
fn filled<W: Work>(values: &[W]) -> [W; GROUP] {
    let mut group = [W::ZERO; GROUP];
    group[..values.len()].copy_from_slice(values);
    group
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

/// How many updates there are, and how many of them changed nothing.
#[inline(always)]
pub fn count_lost<W: Work>(u: &[W], r: &[W]) -> (u64, u64) {
    let (mut updated, mut lost) = (0u32, 0u32);
    for (&u, &r) in u.iter().zip(r) {
        let moves = u != W::ZERO;
        updated += u32::from(moves);
        lost += u32::from(moves & (r == W::ZERO));
    }
    (u64::from(updated), u64::from(lost))
}

/// `r = out - t`: what became of the target, which is widened already.
#[inline(always)]
pub fn change<O: Element, W: Work>(r: &mut [W], out: &[u8], t: &[W]) {
    for ((r, o), &t) in r.iter_mut().zip(elements::<O>(out)).zip(t) {
        *r = W::widen(o) - t;
    }
}

/// [`finish`] and [`change`] in one go, for a target of the output's format.
#[inline(always)]
pub fn finish_change<E: Element, W: Work>(out: &mut [u8], t: &[u8], u: &[W], r: &mut [W]) -> bool {
    let mut largest = W::Magnitude::default();
    for (((o, t), &u), r) in out.chunks_exact_mut(E::SIZE).zip(elements::<E>(t)).zip(u).zip(r.iter_mut()) {
        let before = W::widen(t);
        let sum = before + u;
        largest = largest.max(sum.magnitude());
        let value = if u == W::ZERO { t } else { sum.narrow_below::<E>() };
        *r = W::widen(value) - before;
        value.store(o);
    }
    if largest < W::limit::<E>() {
        return true;
    }
    // Something is not finite, or does not fit: again, with the rounding that minds it.
    let finite = finish::<E, W>(out, t, u);
    for ((r, o), t) in r.iter_mut().zip(elements::<E>(out)).zip(elements::<E>(t)) {
        *r = W::widen(o) - W::widen(t);
    }
    finite
}

/// Sum of `a * b` over at most MICRO elements. Of every [`GROUP`] of 64, lane `j` of [`LANES`] adds up the products at `j`, `j + 16`,
/// `j + 32` and `j + 48` in the work type, and takes the four together into its f64 sum; in the end the lanes join pairwise.
#[inline(always)]
pub fn dot<W: Work>(a: &[W], b: &[W]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (whole, rest) = a.as_chunks::<GROUP>();
    let (whole_b, rest_b) = b.as_chunks::<GROUP>();
    for (a, b) in whole.iter().zip(whole_b) {
        add_products(&mut lanes, a, b);
    }
    if !rest.is_empty() {
        add_products(&mut lanes, &filled(rest), &filled(rest_b));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// What there is to know of some differences.
#[derive(Debug, Clone, Copy)]
pub struct Extent<W> {
    /// The largest absolute value.
    pub max: W,
    /// Non-zero elements.
    pub moved: u64,
    /// Whether all are finite.
    pub finite: bool,
    /// Sum of squares, in the order of [`dot`].
    pub squares: f64,
}

/// Looks at at most MICRO elements, and writes one bit for each: set where it is not zero (bit `i % 8` of byte `i / 8`; whole 64-bit words).
#[inline(always)]
pub fn extent<W: Work>(bits: &mut [u8], x: &[W]) -> Extent<W> {
    let mut largest = W::Magnitude::default();
    for x in x {
        largest = largest.max(x.magnitude());
    }
    let mut max = W::from_magnitude(largest);
    let finite = max.is_finite();
    if !finite {
        max = x.iter().fold(W::ZERO, |m, x| if x.abs() > m { x.abs() } else { m });
    }
    let (whole, rest) = x.as_chunks::<64>();
    let (words, last) = bits.split_at_mut(whole.len() * 8);
    let mut moved = 0;
    for (bytes, x) in words.as_chunks_mut::<8>().0.iter_mut().zip(whole) {
        let mut word = 0u64;
        for (j, &x) in x.iter().enumerate() {
            word |= u64::from(x != W::ZERO) << j;
        }
        *bytes = word.to_le_bytes();
        moved += word.count_ones();
    }
    if !rest.is_empty() {
        let word = rest.iter().enumerate().fold(0u64, |w, (j, &x)| w | u64::from(x != W::ZERO) << j);
        last[..8].copy_from_slice(&word.to_le_bytes());
        moved += word.count_ones();
    }
    Extent { max, moved: u64::from(moved), finite, squares: dot(x, x) }
}

/// Whether `round(n + u)`, with `n`'s own bits where `u` is zero, is `p` bit for bit, for every element. It may say no where
/// some sum does not fit the format.
#[inline(always)]
pub fn rebuilds<E: Element, W: Work>(p: &[u8], n: &[u8], u: &[W]) -> bool {
    let mut same = true;
    let mut largest = W::Magnitude::default();
    for ((p, n), &u) in elements::<E>(p).zip(elements::<E>(n)).zip(u) {
        let sum = W::widen(n) + u;
        largest = largest.max(sum.magnitude());
        let value = if u == W::ZERO { n } else { sum.narrow_below::<E>() };
        same &= value.same_bits(p);
    }
    same & (largest < W::limit::<E>())
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

/// Columns of a register tile of a product.
const ACROSS: usize = 16;

/// `into[i][..columns] += sum over k of a[i][k] * b[k][..columns]` for the rows, the depth and the columns of a size. Rows of `into`, `a` and `b` are
/// `strides` apart. Every element's products are added in the order of `k`, then to what was there: the same bits whatever `tall`,
/// the rows of a register tile, is.
#[inline(always)]
pub fn multiply<W: Work>(
    into: &mut [W],
    a: &[W],
    b: &[W],
    strides: [usize; 3],
    [rows, depth, columns]: [usize; 3],
    tall: usize,
) {
    if depth == 0 {
        return;
    }
    let whole = columns - columns % ACROSS;
    for j in (0..whole).step_by(ACROSS) {
        let b = &b[j..];
        let mut i = 0;
        while i < rows {
            let (into, a) = (&mut into[i * strides[0] + j..], &a[i * strides[1]..]);
            i += match (rows - i).min(tall) {
                12.. => product_12(into, a, b, strides, depth),
                8..12 => product_8(into, a, b, strides, depth),
                6..8 => product_6(into, a, b, strides, depth),
                4..6 => product_4(into, a, b, strides, depth),
                2..4 => product_2(into, a, b, strides, depth),
                _ => product_1(into, a, b, strides, depth),
            };
        }
    }
    if whole < columns {
        for i in 0..rows {
            let mut sums = [W::ZERO; ACROSS];
            let sums = &mut sums[..columns - whole];
            for (k, &a) in a[i * strides[1]..i * strides[1] + depth].iter().enumerate() {
                for (s, &b) in sums.iter_mut().zip(&b[k * strides[2] + whole..k * strides[2] + columns]) {
                    *s = *s + a * b;
                }
            }
            for (o, &s) in into[i * strides[0] + whole..i * strides[0] + columns].iter_mut().zip(&*sums) {
                *o = *o + s;
            }
        }
    }
}

/// A register tile of [`multiply`], with a name for every row: of arrays of rows compilers keep the sums in memory.
macro_rules! product {
    ($name:ident: $($row:ident $sum:ident $r:literal),*) => {
        #[inline(always)]
        fn $name<W: Work>(into: &mut [W], a: &[W], b: &[W], strides: [usize; 3], depth: usize) -> usize {
            let [wide, deep, under] = strides;
            $(let $row = &a[$r * deep..][..depth]; let mut $sum = [W::ZERO; ACROSS];)*
            let b = &b[..(depth - 1) * under + ACROSS];
            for k in 0..depth {
                let b = &b[k * under..][..ACROSS];
                $(
                    let a = $row[k];
                    for (s, &b) in $sum.iter_mut().zip(b) {
                        *s = *s + a * b;
                    }
                )*
            }
            $(
                for (o, &s) in into[$r * wide..][..ACROSS].iter_mut().zip(&$sum) {
                    *o = *o + s;
                }
            )*
            [$($r),*].len()
        }
    };
}

product!(product_1: a0 s0 0);
product!(product_2: a0 s0 0, a1 s1 1);
product!(product_4: a0 s0 0, a1 s1 1, a2 s2 2, a3 s3 3);
product!(product_6: a0 s0 0, a1 s1 1, a2 s2 2, a3 s3 3, a4 s4 4, a5 s5 5);
product!(product_8: a0 s0 0, a1 s1 1, a2 s2 2, a3 s3 3, a4 s4 4, a5 s5 5, a6 s6 6, a7 s7 7);
product!(product_12: a0 s0 0, a1 s1 1, a2 s2 2, a3 s3 3, a4 s4 4, a5 s5 5, a6 s6 6, a7 s7 7, a8 s8 8, a9 s9 9, a10 s10 10, a11 s11 11);

/// Turns the sign of every element whose bit of the generator is set: element `i` has bit `i % 32` of word `i / 32 % 4` at counter `i / 128`.
#[inline(always)]
pub fn flip<W: Work>(values: &mut [W], generator: crate::philox::Philox, from: u64) {
    let mut at = from;
    let mut rest = values;
    while !rest.is_empty() {
        let words = generator.words(at / 128);
        let word = words[(at / 32 % 4) as usize] >> (at % 32);
        let (now, later) = rest.split_at_mut(((32 - at % 32) as usize).min(rest.len()));
        for (i, v) in now.iter_mut().enumerate() {
            *v = if word >> i & 1 == 1 { -*v } else { *v };
        }
        at += now.len() as u64;
        rest = later;
    }
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
