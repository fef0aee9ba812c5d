//! What becomes of a target: widening, scaling, differences, sums, and the one rounding at the end.

use super::elements;
use crate::bf16::{Element, Work};

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

/// Rounded to a format, and widened again.
#[inline(always)]
pub fn round<E: Element, W: Work>(x: &mut [W]) {
    for x in x {
        *x = W::widen(x.narrow::<E>());
    }
}

/// `x = c * x`.
#[inline(always)]
pub fn scale<W: Work>(x: &mut [W], c: W) {
    for x in x {
        *x = c * *x;
    }
}

/// `acc = acc + x`.
#[inline(always)]
pub fn add<W: Work>(acc: &mut [W], x: &[W]) {
    for (acc, &x) in acc.iter_mut().zip(x) {
        *acc = *acc + x;
    }
}

/// `acc = c * v`, or `acc + c * v` when not `first`, with a coefficient for each element, rounded once.
#[inline(always)]
pub fn scaled_each<W: Work>(acc: &mut [W], v: &[W], c: &[f64], first: bool) {
    for ((acc, &v), &c) in acc.iter_mut().zip(v).zip(c) {
        let value = W::from_f64(c) * v;
        *acc = if first { value } else { *acc + value };
    }
}
