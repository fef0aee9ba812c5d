//! Sums and extremes: norms, products, the rounding report.

use super::{GROUP, LANES, elements, filled};
use crate::bf16::{Element, Work};

/// How the realised change of a tensor compares with the intended one.
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

/// The least sum that is believed. Products of f32 lose at most 2^-150 each where they are too small for the format: of a MICRO, less than
/// 2^-37 of a sum as large as this, where f32 itself keeps 2^-24 of a product.
const LEAST: f64 = 1.0 / (1u128 << 100) as f64;

/// Whether the products of a sum fit the work type, as far as the sum tells: it is finite, and not so small that products may have been lost.
/// If it does not hold, the sum is made again in the same order with products in f64, which hold every product of two f32. One look at a
/// sum of thousands of products: ordinary values pay nothing for it. Sums of f64 stay what they are: beyond 1e154 and below 1e-154 their
/// squares do not fit any format.
#[inline(always)]
pub fn holds<W: Work>(sum: f64) -> bool {
    size_of::<W>() == size_of::<f64>() || (LEAST..f64::INFINITY).contains(&sum.abs())
}

/// Adds the products of a group to the lanes.
#[inline(always)]
pub(super) fn add_products<W: Work>(lanes: &mut [f64; LANES], a: &[W; GROUP], b: &[W; GROUP]) {
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

/// Sum of `a * b` over at most MICRO elements. Of every [`GROUP`] of 64, lane `j` of [`LANES`] adds up the products at `j`, `j + 16`,
/// `j + 32` and `j + 48` in the work type, and takes the four together into its f64 sum; in the end the lanes join pairwise. A sum that does
/// not [hold](holds) is made again in f64.
#[inline(always)]
pub fn dot<W: Work>(a: &[W], b: &[W]) -> f64 {
    let mut lanes = [0.0; LANES];
    add_dots(&mut lanes, a, b);
    let sum = join(&lanes);
    if holds::<W>(sum) { sum } else { dot_again(a, b, sum) }
}

/// The sum of a [`dot`] that does not hold, with products in f64; as it was found where nothing moved.
#[cold]
#[inline(never)]
pub(super) fn dot_again<W: Work>(a: &[W], b: &[W], found: f64) -> f64 {
    let still = |x: &[W]| x.chunks(GROUP).all(|x| largest(x) == W::Magnitude::default());
    if still(a) || still(b) {
        return found;
    }
    let mut lanes = [0.0; LANES];
    add_dots_double(&mut lanes, a, b);
    join(&lanes)
}

/// [`add_dots`] with products, and sums of four of them, in f64.
#[inline(always)]
pub fn add_dots_double<W: Work>(into: &mut [f64; LANES], a: &[W], b: &[W]) {
    for (a, b) in a.chunks(GROUP).zip(b.chunks(GROUP)) {
        let (mut a_double, mut b_double) = ([0.0; GROUP], [0.0; GROUP]);
        double(&mut a_double, a);
        double(&mut b_double, b);
        add_products(into, &a_double, &b_double);
    }
}

/// What some elements, all groups but for the last of a MICRO, add to the lanes of a [`dot`].
#[inline(always)]
pub fn add_dots<W: Work>(into: &mut [f64; LANES], a: &[W], b: &[W]) {
    let mut lanes = *into;
    let (whole, rest) = a.as_chunks::<GROUP>();
    let (whole_b, rest_b) = b.as_chunks::<GROUP>();
    for (a, b) in whole.iter().zip(whole_b) {
        add_products(&mut lanes, a, b);
    }
    if !rest.is_empty() {
        add_products(&mut lanes, &filled(rest), &filled(rest_b));
    }
    *into = lanes;
}

/// The [`dot`]s of two tensors of one format, or of what they differ by from a base, in one go: of the first with itself, of both, of the second
/// with itself. What does not [hold](holds) is left to the caller.
#[inline(always)]
pub fn products<E: Element, W: Work>(pair: [&[u8]; 2], base: Option<&[u8]>) -> [f64; 3] {
    match base {
        Some(base) => products_less::<E, W, true>(pair, base),
        None => products_less::<E, W, false>(pair, &[]),
    }
}

#[inline(always)]
fn products_less<E: Element, W: Work, const LESS: bool>([a, b]: [&[u8]; 2], base: &[u8]) -> [f64; 3] {
    let (mut aa, mut ab, mut bb) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    let mut add = |x: &[W; GROUP], y: &[W; GROUP]| {
        add_products(&mut aa, x, x);
        add_products(&mut ab, x, y);
        add_products(&mut bb, y, y);
    };
    let bytes = GROUP * E::SIZE;
    let whole = a.len() / bytes * bytes;
    let groups = a.chunks_exact(bytes).zip(b.chunks_exact(bytes));
    if LESS {
        for ((a, b), base) in groups.zip(base.chunks_exact(bytes)) {
            let n = widened::<E, W>(base);
            let less = |x: [W; GROUP]| std::array::from_fn(|j| x[j] - n[j]);
            add(&less(widened::<E, W>(a)), &less(widened::<E, W>(b)));
        }
    } else {
        for (a, b) in groups {
            add(&widened::<E, W>(a), &widened::<E, W>(b));
        }
    }
    if whole < a.len() {
        let n = if LESS { widened::<E, W>(&base[whole..]) } else { [W::ZERO; GROUP] };
        let less = |x: [W; GROUP]| std::array::from_fn(|j| x[j] - n[j]);
        add(&less(widened::<E, W>(&a[whole..])), &less(widened::<E, W>(&b[whole..])));
    }
    [join(&aa), join(&ab), join(&bb)]
}

/// A group, filled up with zeros.
#[inline(always)]
fn widened<E: Element, W: Work>(bytes: &[u8]) -> [W; GROUP] {
    let mut group = [W::ZERO; GROUP];
    for (x, e) in group.iter_mut().zip(elements::<E>(bytes)) {
        *x = W::widen(e);
    }
    group
}

/// The sum of the lanes of a [`dot`], pairwise. Not inlined: compilers then keep the lanes of the loop before it in as few registers as there can be.
#[inline(never)]
pub fn join(lanes: &[f64; LANES]) -> f64 {
    let mut lanes = *lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
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

/// The largest magnitude.
#[inline(always)]
pub fn largest<W: Work>(x: &[W]) -> W::Magnitude {
    x.iter().fold(W::Magnitude::default(), |largest, x| largest.max(x.magnitude()))
}

/// Widens to f64.
#[inline(always)]
pub fn double<W: Work>(into: &mut [f64], x: &[W]) {
    for (into, x) in into.iter_mut().zip(x) {
        *into = x.to_f64();
    }
}

/// `sums = sums + a * b` in f64, which holds every product of two f32: sums of single products tell nothing of what f32 lost.
#[inline(always)]
pub fn add_products_each<W: Work>(sums: &mut [f64], a: &[W], b: &[W]) {
    for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
        *sum += a.to_f64() * b.to_f64();
    }
}
