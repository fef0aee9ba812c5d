//! The sums that a divergence of two softmaxes is made of.

use super::measure::add_products;
use super::{GROUP, LANES, filled};
use crate::bf16::Work;

/// Added to a number, this leaves its integer part, rounded, in the lowest bits, as the exponent of that power of two.
const SHIFT: f64 = 1.5 * (1u64 << 52) as f64 + 1023.0;
const LN_2: [f64; 2] = [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10];
/// The series of the exponential.
const SERIES: [f64; 14] = [
    1.0,
    1.0,
    1.0 / 2.0,
    1.0 / 6.0,
    1.0 / 24.0,
    1.0 / 120.0,
    1.0 / 720.0,
    1.0 / 5_040.0,
    1.0 / 40_320.0,
    1.0 / 362_880.0,
    1.0 / 3_628_800.0,
    1.0 / 39_916_800.0,
    1.0 / 479_001_600.0,
    1.0 / 6_227_020_800.0,
];

/// Below this, seven terms of the series are as exact as f64.
pub const NEAR: f64 = 1.0 / 64.0;

/// The largest number; what is not a number does not count.
#[inline(always)]
pub fn highest<W: Work>(x: &[W]) -> W {
    let least = W::from_f64(f64::NEG_INFINITY);
    let mut group = [least; GROUP];
    let (whole, rest) = x.as_chunks::<GROUP>();
    for x in whole {
        for j in 0..GROUP {
            group[j] = if x[j] > group[j] { x[j] } else { group[j] };
        }
    }
    group.iter().chain(rest).fold(least, |m, &x| if x > m { x } else { m })
}

/// The largest element of a row, and the largest magnitude of what another differs from it by.
#[inline(always)]
pub fn reach<W: Work>(x: &[W], y: &[W]) -> (W, W::Magnitude) {
    let farthest = x.iter().zip(y).fold(W::Magnitude::default(), |far, (&x, &y)| far.max((y - x).magnitude()));
    (highest(x), farthest)
}

/// Adds the sums of `e_x`, of `e_y` and of `e_y (y - x)`, with `e_x = exp(x - m_x)` and `e_y = exp(y - m_y)` in f64, in the order of
/// [`dot`](super::dot).
#[inline(always)]
pub fn add_weights<W: Work>(sums: &mut [[f64; LANES]; 3], x: &[W], y: &[W], m: [f64; 2]) {
    add_each(sums, x, y, |x, y| {
        let e_y = exp(y - m[1]);
        [exp(x - m[0]), e_y, e_y * (y - x)]
    });
}

/// Adds the sums of `e_x`, of `g = e_x (exp d - 1)` and of `(e_x + g) d`, with `e_x = exp(x - m)` and `d = y - x` of magnitudes below [`NEAR`].
#[inline(always)]
pub fn add_near_weights<W: Work>(sums: &mut [[f64; LANES]; 3], x: &[W], y: &[W], m: f64) {
    add_each(sums, x, y, |x, y| {
        let (e_x, d) = (exp(x - m), y - x);
        let g = e_x * (d * slope(d));
        [e_x, g, (e_x + g) * d]
    });
}

#[inline(always)]
fn add_each<W: Work>(sums: &mut [[f64; LANES]; 3], x: &[W], y: &[W], terms: impl Fn(f64, f64) -> [f64; 3]) {
    let mut lanes = *sums;
    let ((whole_x, rest_x), (whole_y, rest_y)) = (x.as_chunks::<GROUP>(), y.as_chunks::<GROUP>());
    for (x, y) in whole_x.iter().zip(whole_y) {
        add_group(&mut lanes, x, y, GROUP, &terms);
    }
    if !rest_x.is_empty() {
        add_group(&mut lanes, &filled(rest_x), &filled(rest_y), rest_x.len(), &terms);
    }
    *sums = lanes;
}

/// The same of the first `n` of a group.
#[inline(always)]
fn add_group<W: Work>(
    sums: &mut [[f64; LANES]; 3],
    x: &[W; GROUP],
    y: &[W; GROUP],
    n: usize,
    terms: &impl Fn(f64, f64) -> [f64; 3],
) {
    let [mut first, mut second, mut third] = [const { Lines([0.0; GROUP]) }; 3];
    for j in 0..GROUP {
        [first.0[j], second.0[j], third.0[j]] = terms(x[j].to_f64(), y[j].to_f64());
    }
    for (lanes, found) in sums.iter_mut().zip([&mut first.0, &mut second.0, &mut third.0]) {
        found[n..].fill(0.0);
        add_products(lanes, found, &[1.0; GROUP]);
    }
}

/// Whole lines of the cache.
#[repr(align(64))]
#[derive(Clone, Copy)]
struct Lines([f64; GROUP]);

/// `exp y` for numbers that are not positive: `y = k ln 2 + r`, the series of `exp r`, and `k` into the exponent. Zero below -708, where results
/// become subnormal. Terms are added in pairs, and pairs of pairs: one after the other, each would wait for the one before it.
#[inline(always)]
fn exp(y: f64) -> f64 {
    let shifted = y * std::f64::consts::LOG2_E + SHIFT;
    let k = shifted - SHIFT;
    let r = (y - k * LN_2[0]) - k * LN_2[1];
    let (r2, c) = (r * r, &SERIES);
    let pair = |i: usize| c[i + 1] * r + c[i];
    let four = |i: usize| pair(i + 2) * r2 + pair(i);
    let r4 = r2 * r2;
    let (low, high) = (four(4) * r4 + four(0), pair(12) * r4 + four(8));
    let power = f64::from_bits(shifted.to_bits() << 52);
    if y < -708.0 { 0.0 } else { (high * (r4 * r4) + low) * power }
}

/// `(exp d - 1) / d` for magnitudes below [`NEAR`].
#[inline(always)]
fn slope(d: f64) -> f64 {
    let (d2, c) = (d * d, &SERIES[1..]);
    let pair = |i: usize| c[i + 1] * d + c[i];
    (c[6] * d2 + pair(4)) * (d2 * d2) + (pair(2) * d2 + pair(0))
}
