//! What becomes of a target: widening, scaling, differences, sums, and the one rounding at the end.

use std::marker::PhantomData;
use std::ops::Range;

use super::measure::{Rounding, add_products, change, dot_again, holds, join};
use super::{GROUP, LANES, MICRO, elements, filled};
use crate::bf16::{Element, Work};

/// `into = widen(from)`.
#[inline(always)]
pub fn widen<E: Element, W: Work>(into: &mut [W], from: &[u8]) {
    for (w, e) in into.iter_mut().zip(elements::<E>(from)) {
        *w = W::widen(e);
    }
}

/// [`widen`], and the largest magnitude.
#[inline(always)]
pub fn widen_largest<E: Element, W: Work>(into: &mut [W], from: &[u8]) -> W::Magnitude {
    let mut largest = W::Magnitude::default();
    for (w, e) in into.iter_mut().zip(elements::<E>(from)) {
        *w = W::widen(e);
        largest = largest.max(w.magnitude());
    }
    largest
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

/// `acc = c_1 x + c_2 y` for two tensors of one format, or what they differ by from a base: [`scaled`] or [`difference`] twice, in one go.
#[inline(always)]
pub fn blend<E: Element, W: Work>(acc: &mut [W], pair: [&[u8]; 2], base: Option<&[u8]>, c: [W; 2]) {
    // Elements are loaded in the loop's body: of four iterators over elements side by side compilers make no vector code.
    let bytes = acc.len() * E::SIZE;
    let [x, y] = pair.map(|from| from[..bytes].chunks_exact(E::SIZE));
    let pairs = x.zip(y);
    if let Some(base) = base {
        for ((acc, (x, y)), n) in acc.iter_mut().zip(pairs).zip(base[..bytes].chunks_exact(E::SIZE)) {
            let n = W::widen(E::load(n));
            *acc = c[0] * (W::widen(E::load(x)) - n) + c[1] * (W::widen(E::load(y)) - n);
        }
    } else {
        for (acc, (x, y)) in acc.iter_mut().zip(pairs) {
            *acc = c[0] * W::widen(E::load(x)) + c[1] * W::widen(E::load(y));
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

/// [`finish`] for a target of the output's format, and the rounding report of at most MICRO elements, in one go: what was rounded is
/// compared while it is in registers, in groups of [`GROUP`] as [`dot`](super::dot) takes them. Whether all results are finite.
#[inline(always)]
pub fn finish_and_report<E: Element, W: Work>(out: &mut [u8], t: &[u8], u: &[W]) -> (Rounding, bool) {
    let (report, largest) = finish_pieces::<E, W, false>(out, t, u);
    if largest < W::limit::<E>() {
        return (settled::<E, W>(report, out, t, u), true);
    }
    // Something is not finite, or does not fit: again, with the rounding that minds it.
    let (report, _) = finish_pieces::<E, W, true>(out, t, u);
    (settled::<E, W>(report, out, t, u), elements::<E>(out).all(Element::finite))
}

/// [`finish_and_report`] for updates of [`difference`], which are made piece by piece and kept nowhere: to write them and read them again takes
/// a sixth of a whole `apply`. `None` where something is not finite or does not fit, or a sum does not [hold](holds): `out` is to be made again.
#[inline(always)]
pub fn difference_and_report<E: Element, W: Work>(
    out: &mut [u8],
    t: &[u8],
    pair: [&[u8]; 2],
    c: W,
) -> Option<Rounding> {
    let (report, largest) = finish_pieces::<E, W, false>(out, t, Scaled::<E, W> { pair, c, format: PhantomData });
    (largest < W::limit::<E>() && all_hold::<W>(&report)).then_some(report)
}

/// Where updates come from.
trait Updates<W> {
    /// Some of them, which `room` is long enough for.
    fn piece<'a>(&'a self, room: &'a mut [W], at: Range<usize>) -> &'a [W];
}

impl<W> Updates<W> for &[W] {
    #[inline(always)]
    fn piece<'a>(&'a self, _room: &'a mut [W], at: Range<usize>) -> &'a [W] {
        &self[at]
    }
}

/// `c * (p - n)` of a pair, in a format.
struct Scaled<'a, E, W> {
    pair: [&'a [u8]; 2],
    c: W,
    format: PhantomData<E>,
}

impl<E: Element, W: Work> Updates<W> for Scaled<'_, E, W> {
    #[inline(always)]
    fn piece<'a>(&'a self, room: &'a mut [W], at: Range<usize>) -> &'a [W] {
        let [p, n] = self.pair.map(|x| &x[at.start * E::SIZE..at.end * E::SIZE]);
        let piece = &mut room[..at.len()];
        difference::<E, W>(piece, p, n, self.c, true);
        piece
    }
}

#[inline(always)]
fn finish_pieces<E: Element, W: Work, const MINDFUL: bool>(
    out: &mut [u8],
    t: &[u8],
    updates: impl Updates<W>,
) -> (Rounding, W::Magnitude) {
    let mut largest = W::Magnitude::default();
    let mut lanes = [[0.0; LANES]; 3];
    let (mut updated, mut lost) = (0u32, 0u32);
    let (mut r, mut room) = ([W::ZERO; PIECE], [W::ZERO; PIECE]);
    for (i, (out, t)) in out.chunks_mut(PIECE * E::SIZE).zip(t.chunks(PIECE * E::SIZE)).enumerate() {
        let from = i * PIECE;
        let u = updates.piece(&mut room, from..from + t.len() / E::SIZE);
        let r = &mut r[..u.len()];
        for (((o, t), &u), r) in out.chunks_exact_mut(E::SIZE).zip(elements::<E>(t)).zip(u).zip(r.iter_mut()) {
            let before = W::widen(t);
            let sum = before + u;
            largest = largest.max(sum.magnitude());
            let rounded = if MINDFUL { sum.narrow::<E>() } else { sum.narrow_below::<E>() };
            let moves = u != W::ZERO;
            let value = if moves { rounded } else { t };
            value.store(o);
            let change = if moves { W::widen(rounded) } else { before } - before;
            updated += u32::from(moves);
            lost += u32::from(moves & (change == W::ZERO));
            *r = change;
        }
        let (whole, rest) = u.as_chunks::<GROUP>();
        let (whole_r, rest_r) = r.as_chunks::<GROUP>();
        let [mut a, mut b, mut c] = lanes;
        for (u, r) in whole.iter().zip(whole_r) {
            add_products(&mut a, u, u);
            add_products(&mut b, r, r);
            add_products(&mut c, u, r);
        }
        if !rest.is_empty() {
            let (u, r) = (filled(rest), filled(rest_r));
            add_products(&mut a, &u, &u);
            add_products(&mut b, &r, &r);
            add_products(&mut c, &u, &r);
        }
        lanes = [a, b, c];
    }
    let [intended, realised, dot] = lanes.each_ref().map(join);
    let report = Rounding { intended, realised, dot, updated: u64::from(updated), lost: u64::from(lost) };
    (report, largest)
}

/// A report whose sums [hold](holds), or are made again.
#[inline(always)]
pub fn settled<E: Element, W: Work>(mut report: Rounding, out: &[u8], t: &[u8], u: &[W]) -> Rounding {
    if !all_hold::<W>(&report) {
        report_again::<E, W>(&mut report, out, t, u);
    }
    report
}

/// Whether the sums of a report [hold](holds). Where nothing is updated, or all of it is lost, sums are zero as they should be.
#[inline(always)]
pub fn all_hold<W: Work>(report: &Rounding) -> bool {
    let Rounding { intended, realised, dot, updated, lost } = *report;
    let holds = |sum| holds::<W>(sum) || updated == 0;
    holds(intended) && (updated == lost || holds(realised) && holds(dot))
}

/// The sums of a report that do not [hold](holds).
#[cold]
#[inline(never)]
fn report_again<E: Element, W: Work>(report: &mut Rounding, out: &[u8], t: &[u8], u: &[W]) {
    let (mut before, mut r) = ([W::ZERO; MICRO], [W::ZERO; MICRO]);
    let (before, r) = (&mut before[..u.len()], &mut r[..u.len()]);
    widen::<E, W>(before, t);
    change::<E, W>(r, out, before);
    for (sum, a, b) in [(&mut report.intended, u, u), (&mut report.realised, &*r, &*r), (&mut report.dot, u, &*r)] {
        if !holds::<W>(*sum) {
            *sum = dot_again(a, b, *sum);
        }
    }
}

/// Elements of which everything that is computed stays in the first-level cache beside what is read and written.
const PIECE: usize = 512;

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
