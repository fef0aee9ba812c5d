//! Which differences are kept: bands of magnitude, signs, counts, and the sums over what stays.

use super::random::Draw;
use super::{GROUP, elements};
use crate::bf16::{Element, Work};

/// `x = x - base`; the largest magnitude of the result.
#[inline(always)]
pub fn less<W: Work>(x: &mut [W], base: &[W]) -> W::Magnitude {
    let mut largest = W::Magnitude::default();
    for (x, &b) in x.iter_mut().zip(base) {
        let d = *x - b;
        largest = largest.max(d.magnitude());
        *x = d;
    }
    largest
}

/// `into = x - base` for a pair of one format; the largest magnitude of the result.
#[inline(always)]
pub fn apart<E: Element, W: Work>(into: &mut [W], pair: [&[u8]; 2]) -> W::Magnitude {
    let mut largest = W::Magnitude::default();
    for ((into, x), b) in into.iter_mut().zip(elements::<E>(pair[0])).zip(elements::<E>(pair[1])) {
        let d = W::widen(x) - W::widen(b);
        largest = largest.max(d.magnitude());
        *into = d;
    }
    largest
}

/// Which magnitudes stay, and what they are multiplied by.
#[derive(Debug, Clone, Copy)]
pub struct Band<W: Work> {
    /// From this.
    pub floor: W::Magnitude,
    /// To just below this.
    pub ceiling: W::Magnitude,
    /// Times this.
    pub c: W,
}

/// `into = c * d` where the magnitude of `d = x - base` is in the band, else zero; `sum = sum + into`, from zero when `first`. The largest
/// magnitude of `d`.
#[inline(always)]
pub fn keep_apart<E: Element, W: Work>(
    into: &mut [W],
    sum: &mut [W],
    pair: [&[u8]; 2],
    band: Band<W>,
    first: bool,
) -> W::Magnitude {
    let Band { floor, ceiling, c } = band;
    let mut largest = W::Magnitude::default();
    let pairs = elements::<E>(pair[0]).zip(elements::<E>(pair[1]));
    for ((into, sum), (x, b)) in into.iter_mut().zip(sum).zip(pairs) {
        let d = W::widen(x) - W::widen(b);
        let key = d.magnitude();
        largest = largest.max(key);
        let kept = if (key >= floor) & (key < ceiling) { c * d } else { W::ZERO };
        *into = kept;
        *sum = if first { W::ZERO } else { *sum } + kept;
    }
    largest
}

/// How what stays of two inputs is added up.
#[derive(Debug, Clone, Copy)]
pub struct Vote<W> {
    /// Whether only what has the sign of the sum counts.
    pub elect: bool,
    /// What the sum is divided by where neither counts, the first, the second, and both.
    pub divisors: [W; 4],
    /// What the result is multiplied by.
    pub lambda: W,
}

/// [`keep_apart`] of two tensors of the base's format, [`add_agreeing`] and [`divide`] in one go. The largest magnitude of the differences.
#[inline(always)]
pub fn vote_apart<E: Element, W: Work>(
    u: &mut [W],
    pairs: [&[u8]; 2],
    base: &[u8],
    bands: [Band<W>; 2],
    vote: Vote<W>,
) -> W::Magnitude {
    if vote.elect {
        vote_each_apart::<E, W, true>(u, pairs, base, bands, vote)
    } else {
        vote_each_apart::<E, W, false>(u, pairs, base, bands, vote)
    }
}

#[inline(always)]
fn vote_each_apart<E: Element, W: Work, const ELECT: bool>(
    u: &mut [W],
    pairs: [&[u8]; 2],
    base: &[u8],
    bands: [Band<W>; 2],
    vote: Vote<W>,
) -> W::Magnitude {
    let (mut largest, mut other) = (W::Magnitude::default(), W::Magnitude::default());
    let [first, second] = bands;
    // Elements are loaded in the loop's body: of four iterators over elements side by side compilers make no vector code.
    let n = u.len() * E::SIZE;
    let x = pairs[0][..n].chunks_exact(E::SIZE);
    let y = pairs[1][..n].chunks_exact(E::SIZE);
    let base = base[..n].chunks_exact(E::SIZE);
    for (((u, x), y), b) in u.iter_mut().zip(x).zip(y).zip(base) {
        let b = W::widen(E::load(b));
        let d = W::widen(E::load(x)) - b;
        let e = W::widen(E::load(y)) - b;
        largest = largest.max(d.magnitude());
        other = other.max(e.magnitude());
        *u = vote.settle::<ELECT>(first.keep(d), second.keep(e));
    }
    largest.max(other)
}

/// [`vote_apart`] where random words choose.
#[inline(always)]
pub fn vote_drawn<E: Element, W: Work>(
    u: &mut [W],
    pairs: [&[u8]; 2],
    base: &[u8],
    draws: [Draw<'_, W>; 2],
    vote: Vote<W>,
) -> W::Magnitude {
    if vote.elect {
        vote_each_drawn::<E, W, true>(u, pairs, base, draws, vote)
    } else {
        vote_each_drawn::<E, W, false>(u, pairs, base, draws, vote)
    }
}

#[inline(always)]
fn vote_each_drawn<E: Element, W: Work, const ELECT: bool>(
    u: &mut [W],
    pairs: [&[u8]; 2],
    base: &[u8],
    [first, second]: [Draw<'_, W>; 2],
    vote: Vote<W>,
) -> W::Magnitude {
    let (mut largest, mut other) = (W::Magnitude::default(), W::Magnitude::default());
    let n = u.len() * E::SIZE;
    let x = pairs[0][..n].chunks_exact(E::SIZE).zip(first.words);
    let y = pairs[1][..n].chunks_exact(E::SIZE).zip(second.words);
    let base = base[..n].chunks_exact(E::SIZE);
    // 32 bits to a comparison, not 64.
    let (any, last) = (first.limit > 0, first.limit.saturating_sub(1) as u32);
    let (any_other, last_other) = (second.limit > 0, second.limit.saturating_sub(1) as u32);
    for (((u, (x, &word)), (y, &other_word)), b) in u.iter_mut().zip(x).zip(y).zip(base) {
        let b = W::widen(E::load(b));
        let d = W::widen(E::load(x)) - b;
        let e = W::widen(E::load(y)) - b;
        largest = largest.max(d.magnitude());
        other = other.max(e.magnitude());
        let d = if any & (word <= last) { first.c * d } else { W::ZERO };
        let e = if any_other & (other_word <= last_other) { second.c * e } else { W::ZERO };
        *u = vote.settle::<ELECT>(d, e);
    }
    largest.max(other)
}

/// `u` from what stays of two inputs, times `c`.
#[inline(always)]
pub fn vote<W: Work>(u: &mut [W], inputs: [&[W]; 2], c: [W; 2], vote: Vote<W>) {
    let pairs = u.iter_mut().zip(inputs[0]).zip(inputs[1]);
    if vote.elect {
        pairs.for_each(|((u, &d), &e)| *u = vote.settle::<true>(c[0] * d, c[1] * e));
    } else {
        pairs.for_each(|((u, &d), &e)| *u = vote.settle::<false>(c[0] * d, c[1] * e));
    }
}

impl<W: Work> Vote<W> {
    /// The sum of two inputs, or of those that have its sign, over what it is divided by.
    #[inline(always)]
    fn settle<const ELECT: bool>(&self, d: W, e: W) -> W {
        let [neither, only_first, only_second, both] = self.divisors;
        let sum = d + e;
        let (acc, by) = if ELECT {
            // With the sign of the sum turned off, what has that sign is positive.
            let sign = sum.bits() ^ sum.magnitude();
            let ordered = sum >= W::ZERO || sum < W::ZERO;
            let agrees = |x: W| ordered & (W::from_magnitude(x.bits() ^ sign) > W::ZERO);
            let (d_agrees, e_agrees) = (agrees(d), agrees(e));
            let acc = if d_agrees { d } else { W::ZERO } + if e_agrees { e } else { W::ZERO };
            let without = if d_agrees { only_first } else { neither };
            let with = if d_agrees { both } else { only_second };
            (acc, if e_agrees { with } else { without })
        } else {
            (sum, both)
        };
        self.lambda * (acc / by)
    }
}

impl<W: Work> Band<W> {
    /// `c * d` where the magnitude is in the band, else zero.
    #[inline(always)]
    fn keep(&self, d: W) -> W {
        let key = d.magnitude();
        if (key >= self.floor) & (key < self.ceiling) { self.c * d } else { W::ZERO }
    }
}

/// How many magnitudes of `x - base` equal `key`, for a pair of one format.
#[inline(always)]
pub fn count_equal_apart<E: Element, W: Work>(pair: [&[u8]; 2], key: W::Magnitude) -> u64 {
    let mut equal = 0u32;
    for (x, b) in elements::<E>(pair[0]).zip(elements::<E>(pair[1])) {
        equal += u32::from((W::widen(x) - W::widen(b)).magnitude() == key);
    }
    u64::from(equal)
}

/// Marks every element whose magnitude is between `lo` and `hi`, and counts those that are not below.
#[inline(always)]
pub fn sift<W: Work>(marks: &mut [u8], x: &[W], lo: W::Magnitude, hi: W::Magnitude) -> Sifted {
    let (mut above, mut highest, mut lowest) = (0u32, 0u32, 0u32);
    for (mark, x) in marks.iter_mut().zip(x) {
        let key = x.magnitude();
        above += u32::from(key > hi);
        highest += u32::from(key == hi);
        lowest += u32::from(key == lo);
        *mark = u8::from((key > lo) & (key < hi));
    }
    Sifted { above: u64::from(above), highest: u64::from(highest), lowest: u64::from(lowest) }
}

/// [`sift`] of `x - base` for a pair of one format, and the largest magnitude. Without room for marks it counts only.
#[inline(always)]
pub fn sift_apart<E: Element, W: Work>(
    marks: &mut [u8],
    pair: [&[u8]; 2],
    lo: W::Magnitude,
    hi: W::Magnitude,
) -> (Sifted, W::Magnitude) {
    let mut largest = W::Magnitude::default();
    let (mut above, mut highest, mut lowest) = (0u32, 0u32, 0u32);
    if marks.is_empty() {
        for (x, b) in elements::<E>(pair[0]).zip(elements::<E>(pair[1])) {
            let key = (W::widen(x) - W::widen(b)).magnitude();
            largest = largest.max(key);
            above += u32::from(key > hi);
            highest += u32::from(key == hi);
            lowest += u32::from(key == lo);
        }
    }
    for ((mark, x), b) in marks.iter_mut().zip(elements::<E>(pair[0])).zip(elements::<E>(pair[1])) {
        let key = (W::widen(x) - W::widen(b)).magnitude();
        largest = largest.max(key);
        above += u32::from(key > hi);
        highest += u32::from(key == hi);
        lowest += u32::from(key == lo);
        *mark = u8::from((key > lo) & (key < hi));
    }
    (Sifted { above: u64::from(above), highest: u64::from(highest), lowest: u64::from(lowest) }, largest)
}

/// What [`sift`] counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sifted {
    /// Above `hi`.
    pub above: u64,
    /// At `hi`.
    pub highest: u64,
    /// At `lo`.
    pub lowest: u64,
}

/// How many magnitudes equal `key`.
#[inline(always)]
pub fn count_equal<W: Work>(x: &[W], key: W::Magnitude) -> u64 {
    let mut equal = 0u32;
    for x in x {
        equal += u32::from(x.magnitude() == key);
    }
    u64::from(equal)
}

/// Keeps what has a magnitude from `floor` to just below `ceiling`; the rest becomes zero.
#[inline(always)]
pub fn trim<W: Work>(x: &mut [W], floor: W::Magnitude, ceiling: W::Magnitude) {
    for x in x {
        let key = x.magnitude();
        *x = if (key >= floor) & (key < ceiling) { *x } else { W::ZERO };
    }
}

/// `x = c * x` where the magnitude is in the band, else zero; and `sum = sum + x`, from zero when `first`.
#[inline(always)]
pub fn keep_scaled<W: Work>(x: &mut [W], sum: &mut [W], band: Band<W>, first: bool) {
    let Band { floor, ceiling, c } = band;
    for (x, sum) in x.iter_mut().zip(sum) {
        let key = x.magnitude();
        let kept = if (key >= floor) & (key < ceiling) { c * *x } else { W::ZERO };
        *x = kept;
        *sum = if first { W::ZERO } else { *sum } + kept;
    }
}

/// Where `x` has the sign of `sign` (zero counts as positive there, and as neither in `x`): `acc = acc + x` and `share = share + w`, both from
/// zero when `first`.
#[inline(always)]
pub fn add_agreeing<W: Work>(acc: &mut [W], share: &mut [W], x: &[W], sign: &[W], w: W, first: bool) {
    for (((acc, share), &x), &sign) in acc.iter_mut().zip(share).zip(x).zip(sign) {
        let positive = (x > W::ZERO) & (sign >= W::ZERO);
        let negative = (x < W::ZERO) & (sign < W::ZERO);
        let agrees = positive | negative;
        *acc = if first { W::ZERO } else { *acc } + if agrees { x } else { W::ZERO };
        *share = if first { W::ZERO } else { *share } + if agrees { w } else { W::ZERO };
    }
}

/// `acc = c * (acc / share)`, but `c * acc` where the magnitude of `share` is below `least`.
#[inline(always)]
pub fn divide<W: Work>(acc: &mut [W], share: &[W], least: W, c: W) {
    for (acc, &share) in acc.iter_mut().zip(share) {
        let by = if share.abs() < least { W::from_f64(1.0) } else { share };
        *acc = c * (*acc / by);
    }
}

/// `into = |x|`.
#[inline(always)]
pub fn absolute<W: Work>(into: &mut [W], x: &[W]) {
    for (into, x) in into.iter_mut().zip(x) {
        *into = x.abs();
    }
}

/// `into = (x_1 - mean)^2 + (x_2 - mean)^2 + ...` with `mean = (x_1 + x_2 + ...) / n`, for the elements of some inputs from `at` on.
#[inline(always)]
pub fn spread<W: Work>(into: &mut [W], inputs: &[Vec<W>], at: usize) {
    let n = W::from_f64(inputs.len() as f64);
    let (whole, rest) = into.as_chunks_mut::<GROUP>();
    let last = at + whole.len() * GROUP;
    for (g, into) in whole.iter_mut().enumerate() {
        let from = at + g * GROUP;
        let (mut mean, mut sum) = ([W::ZERO; GROUP], [W::ZERO; GROUP]);
        for x in inputs {
            let x = &x[from..from + GROUP];
            for j in 0..GROUP {
                mean[j] = mean[j] + x[j];
            }
        }
        for mean in &mut mean {
            *mean = *mean / n;
        }
        for x in inputs {
            let x = &x[from..from + GROUP];
            for j in 0..GROUP {
                let off = x[j] - mean[j];
                sum[j] = sum[j] + off * off;
            }
        }
        *into = sum;
    }
    for (i, into) in rest.iter_mut().enumerate() {
        let mean = inputs.iter().fold(W::ZERO, |sum, x| sum + x[last + i]) / n;
        let square = |x: &Vec<W>| (x[last + i] - mean) * (x[last + i] - mean);
        *into = inputs.iter().fold(W::ZERO, |sum, x| sum + square(x));
    }
}

/// Counts, element by element, whose magnitude is above a bound.
#[inline(always)]
pub fn count_moved<W: Work>(count: &mut [W], x: &[W], bound: W) {
    for (count, &x) in count.iter_mut().zip(x) {
        *count = *count + if x.abs() > bound { W::from_f64(1.0) } else { W::ZERO };
    }
}

/// Of the elements above a bound: those that nobody else moved, and those that others moved too.
#[inline(always)]
pub fn count_alone<W: Work>(count: &[W], x: &[W], bound: W) -> (u64, u64) {
    let one = W::from_f64(1.0);
    let (mut alone, mut shared) = (0u32, 0u32);
    for (&count, &x) in count.iter().zip(x) {
        let moved = x.abs() > bound;
        alone += u32::from(moved & (count == one));
        shared += u32::from(moved & (count != one));
    }
    (u64::from(alone), u64::from(shared))
}

/// `acc = acc + x` where `x` is above a bound, enlarged where nobody else moved.
#[inline(always)]
pub fn add_moved<W: Work>(acc: &mut [W], x: &[W], count: &[W], bound: W, factor: W) {
    let one = W::from_f64(1.0);
    for ((acc, &x), &count) in acc.iter_mut().zip(x).zip(count) {
        let scale = if count == one { factor } else { one };
        *acc = if x.abs() > bound { *acc + scale * x } else { *acc };
    }
}

/// `acc = acc / max(count, 1)`.
#[inline(always)]
pub fn divide_by_count<W: Work>(acc: &mut [W], count: &[W]) {
    let one = W::from_f64(1.0);
    for (acc, &count) in acc.iter_mut().zip(count) {
        *acc = *acc / if count > one { count } else { one };
    }
}

/// Keeps what has the sign of `sign`, zero counting as positive there; the rest becomes zero.
#[inline(always)]
pub fn keep_agreeing<W: Work>(x: &mut [W], sign: &[W]) {
    for (x, &sign) in x.iter_mut().zip(sign) {
        let agrees = if sign >= W::ZERO { *x > W::ZERO } else { *x < W::ZERO };
        *x = if agrees { *x } else { W::ZERO };
    }
}

/// Keeps `x` where `other` has a magnitude of at least `floor`; the rest becomes zero.
#[inline(always)]
pub fn keep_where<W: Work>(x: &mut [W], other: &[W], floor: W::Magnitude) {
    for (x, other) in x.iter_mut().zip(other) {
        *x = if other.magnitude() >= floor { *x } else { W::ZERO };
    }
}

/// `u = b` where `|b - a| <= t`, else `a + t` or `a - t`, towards `b`.
#[inline(always)]
pub fn nearer<W: Work>(u: &mut [W], a: &[W], b: &[W], t: W) {
    for ((u, &a), &b) in u.iter_mut().zip(a).zip(b) {
        let d = b - a;
        let step = if d < W::ZERO { W::ZERO - t } else { t };
        *u = if d.abs() <= t { b } else { a + step };
    }
}

/// `into = |x| * c`: the product in f64, rounded once.
#[inline(always)]
pub fn weigh<W: Work>(into: &mut [W], x: &[W], c: f64) {
    for (into, x) in into.iter_mut().zip(x) {
        *into = W::from_f64(x.abs().to_f64() * c);
    }
}
