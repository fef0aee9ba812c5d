//! What compilers make too much of: the rounding report of bf16, which every element of nearly every output passes through, by the instructions
//! themselves. Bit for bit what the [kernel](super::kernel) says.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::kernel::{LANES, MICRO, Rounding, join};

/// Elements of a group, in four vectors.
const GROUP: usize = 64;
const VECTOR: usize = 16;

/// Sums of products, lane by lane, as [`super::kernel::dot`] makes them.
#[derive(Clone, Copy)]
struct Sum([__m512d; 2]);

impl Sum {
    #[target_feature(enable = "avx512f,avx512dq")]
    fn zero() -> Self {
        Self([_mm512_setzero_pd(); 2])
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    fn add(&mut self, a: [__m512; 4], b: [__m512; 4]) {
        let first = _mm512_add_ps(_mm512_mul_ps(a[0], b[0]), _mm512_mul_ps(a[1], b[1]));
        let second = _mm512_add_ps(_mm512_mul_ps(a[2], b[2]), _mm512_mul_ps(a[3], b[3]));
        let fours = _mm512_add_ps(first, second);
        let halves = [_mm512_castps512_ps256(fours), _mm512_extractf32x8_ps::<1>(fours)];
        for (lanes, half) in self.0.iter_mut().zip(halves) {
            *lanes = _mm512_add_pd(*lanes, _mm512_cvtps_pd(half));
        }
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    fn join(self) -> f64 {
        let mut lanes = [0.0; LANES];
        // SAFETY: two vectors of eight.
        unsafe {
            _mm512_storeu_pd(lanes.as_mut_ptr(), self.0[0]);
            _mm512_storeu_pd(lanes.as_mut_ptr().add(LANES / 2), self.0[1]);
        }
        join(&lanes)
    }
}

/// [`super::kernel::finish_and_report`] of at most MICRO elements of bf16 with updates in f32, before anybody asks whether its sums hold; `None` where an
/// element, or a sum of squares, is not finite, and `out` is to be made again.
///
/// # Panics
/// The lengths differ.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub(super) fn finish_report_bf16(out: &mut [u8], t: &[u8], u: &[f32]) -> Option<Rounding> {
    assert!(out.len() == 2 * u.len() && t.len() == out.len() && u.len() <= MICRO);
    let mut report = Report::default();
    let ((outs, last_out), (ts, last_t)) = (out.as_chunks_mut(), t.as_chunks());
    let (us, last_u) = u.as_chunks();
    for ((out, t), u) in outs.iter_mut().zip(ts).zip(us) {
        report.group(out, t, load(u));
    }
    if !last_u.is_empty() {
        // Zeros that are updated by zeros tell nothing.
        let (mut out, mut u) = ([0; 2 * GROUP], [0.0; GROUP]);
        u[..last_u.len()].copy_from_slice(last_u);
        report.group(&mut out, &filled(last_t), load(&u));
        last_out.copy_from_slice(&out[..last_t.len()]);
    }
    report.done()
}

/// [`finish_report_bf16`] for updates of `c * (p - n)`, which are made in registers.
///
/// # Panics
/// The lengths differ.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub(super) fn difference_report_bf16(out: &mut [u8], t: &[u8], [p, n]: [&[u8]; 2], c: f32) -> Option<Rounding> {
    assert!(out.len() == t.len() && p.len() == t.len() && n.len() == t.len() && t.len() <= 2 * MICRO);
    let mut report = Report::default();
    let ((outs, last_out), (ts, last_t)) = (out.as_chunks_mut(), t.as_chunks());
    let ((ps, last_p), (ns, last_n)) = (p.as_chunks(), n.as_chunks());
    for ((out, t), (p, n)) in outs.iter_mut().zip(ts).zip(ps.iter().zip(ns)) {
        report.group(out, t, difference(p, n, c));
    }
    if !last_t.is_empty() {
        let mut out = [0; 2 * GROUP];
        report.group(&mut out, &filled(last_t), difference(&filled(last_p), &filled(last_n), c));
        last_out.copy_from_slice(&out[..last_t.len()]);
    }
    report.done()
}

/// The bytes of a group that has fewer elements, and zeros.
fn filled(bytes: &[u8]) -> [u8; 2 * GROUP] {
    let mut group = [0; 2 * GROUP];
    group[..bytes.len()].copy_from_slice(bytes);
    group
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
#[inline]
fn load(u: &[f32; GROUP]) -> [__m512; 4] {
    let mut vectors = [_mm512_setzero_ps(); 4];
    for (into, u) in vectors.iter_mut().zip(u.as_chunks::<VECTOR>().0) {
        // SAFETY: a vector of 64 bytes.
        *into = unsafe { _mm512_loadu_ps(u.as_ptr()) };
    }
    vectors
}

/// As [`super::kernel::difference`] makes it. (A loop, because compilers do not take the closure of a `map` into it: half the speed.)
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
#[inline]
fn difference(p: &[u8; 2 * GROUP], n: &[u8; 2 * GROUP], c: f32) -> [__m512; 4] {
    let mut vectors = [_mm512_setzero_ps(); 4];
    for (i, into) in vectors.iter_mut().enumerate() {
        let apart = _mm512_sub_ps(_mm512_castsi512_ps(widened(p, i)), _mm512_castsi512_ps(widened(n, i)));
        *into = _mm512_mul_ps(_mm512_set1_ps(c), apart);
    }
    vectors
}

/// A vector among four of a group, as the bits of f32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
#[inline]
fn widened(x: &[u8; 2 * GROUP], i: usize) -> __m512i {
    let vectors = x.as_chunks::<{ 2 * VECTOR }>().0;
    // SAFETY: a vector of 32 bytes.
    let vector = unsafe { _mm256_loadu_si256(vectors[i].as_ptr().cast()) };
    _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(vector))
}

struct Report {
    intended: Sum,
    realised: Sum,
    dot: Sum,
    updated: u64,
    lost: u64,
}

impl Report {
    #[target_feature(enable = "avx512f,avx512dq")]
    fn default() -> Self {
        Self { intended: Sum::zero(), realised: Sum::zero(), dot: Sum::zero(), updated: 0, lost: 0 }
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    fn done(self) -> Option<Rounding> {
        let Self { updated, lost, .. } = self;
        let [intended, realised, dot] = [self.intended.join(), self.realised.join(), self.dot.join()];
        // What is not finite, as target, update or output, shows in the one sum or the other.
        (intended.is_finite() && realised.is_finite()).then_some(Rounding { intended, realised, dot, updated, lost })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
    #[inline]
    fn group(&mut self, out: &mut [u8; 2 * GROUP], t: &[u8; 2 * GROUP], us: [__m512; 4]) {
        let one = _mm512_set1_epi32(1);
        let (mut updated, mut still) = (0, 0);
        let (mut changes, mut after) = ([_mm512_setzero_ps(); 4], [one; 4]);
        for (i, u) in us.into_iter().enumerate() {
            let before = widened(t, i);
            let sum = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(before), u));
            // To nearest even: half a unit less one is added, and the bit that decides ties.
            let odd = _mm512_test_epi32_mask(sum, _mm512_set1_epi32(1 << 16));
            let rounded = _mm512_add_epi32(sum, _mm512_set1_epi32(0x7FFF));
            let rounded = _mm512_mask_add_epi32(rounded, odd, rounded, one);
            let moves = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(u, _mm512_setzero_ps());
            after[i] = _mm512_mask_and_epi32(before, moves, rounded, _mm512_set1_epi32(!0xFFFF));
            let change = _mm512_sub_ps(_mm512_castsi512_ps(after[i]), _mm512_castsi512_ps(before));
            let lost = _mm512_mask_cmp_ps_mask::<_CMP_EQ_OQ>(moves, change, _mm512_setzero_ps());
            updated |= u64::from(moves) << (VECTOR * i);
            still |= u64::from(lost) << (VECTOR * i);
            changes[i] = change;
        }
        self.updated += u64::from(updated.count_ones());
        self.lost += u64::from(still.count_ones());
        for (i, after) in after.as_chunks::<2>().0.iter().enumerate() {
            // The upper half of every element of both.
            let halves = _mm512_permutex2var_epi16(after[0], upper_halves(), after[1]);
            // SAFETY: one of two vectors of 64 bytes that make a group.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(GROUP * i).cast(), halves) };
        }
        self.intended.add(us, us);
        self.realised.add(changes, changes);
        self.dot.add(us, changes);
    }
}

/// The odd 16-bit elements of two vectors.
#[target_feature(enable = "avx512f")]
fn upper_halves() -> __m512i {
    const ODD: [u16; 32] = {
        let (mut odd, mut i) = ([0; 32], 0);
        while i < 32 {
            odd[i] = 2 * i as u16 + 1;
            i += 1;
        }
        odd
    };
    // SAFETY: 32 elements of two bytes.
    unsafe { _mm512_loadu_si512(ODD.as_ptr().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16::Bf16;
    use crate::simd::{Level, kernel};
    use proptest::prelude::*;

    /// Outputs, report and whether all is finite, of the kernel and by hand.
    fn check(t: &[u16], u: &[f32]) {
        let bytes: Vec<u8> = t.iter().flat_map(|t| t.to_le_bytes()).collect();
        let (mut expected, mut out) = (vec![0; bytes.len()], vec![1; bytes.len()]);
        let (report, finite) = kernel::finish_and_report::<Bf16, f32>(&mut expected, &bytes, u);
        // SAFETY: the caller has seen that this level is there.
        let found = unsafe { finish_report_bf16(&mut out, &bytes, u) };
        let fits = report.intended < 1e38 && report.realised < 1e38;
        assert!(found.is_some() == finite || finite && !fits, "{found:?} {report:?}");
        if let Some(found) = found {
            assert_eq!(out, expected);
            let found = kernel::settled::<Bf16, f32>(found, &out, &bytes, u);
            let bits = |r: &Rounding| [r.intended, r.realised, r.dot].map(f64::to_bits);
            assert_eq!(bits(&found), bits(&report));
            assert_eq!((found.updated, found.lost), (report.updated, report.lost));
        }
    }

    fn is_here() -> bool {
        Level::available().iter().any(|level| level.name() == "avx512")
    }

    proptest! {
        #[test]
        fn it_says_what_the_kernel_says(
            elements in prop::collection::vec((any::<u16>(), any::<u32>(), 0..4u8), 0..300),
            tame in any::<bool>(),
        ) {
            if is_here() {
                let t: Vec<u16> = elements.iter().map(|e| if tame { e.0 & 0xBFFF } else { e.0 }).collect();
                // Updates of any bits, of zero, and of the size of the last bit that a bf16 holds.
                let u: Vec<f32> = elements.iter().zip(&t).map(|(e, &t)| match e.2 {
                    0 => 0.0,
                    1 => f32::from_bits(u32::from(t) << 16) * ((e.1 & 0xFFFF) as f32 / 6e6),
                    2 if tame => f32::from_bits(e.1 & 0xBFFF_FFFF),
                    2 => f32::from_bits(e.1),
                    _ => -0.0,
                }).collect();
                check(&t, &u);
            }
        }
    }

    #[test]
    fn every_bf16_is_rounded_as_by_the_kernel() {
        if is_here() {
            let all: Vec<u16> = (0..=u16::MAX).collect();
            for t in all.chunks(MICRO) {
                let values = || t.iter().map(|&t| f32::from_bits(u32::from(t) << 16));
                check(t, &values().map(|t| t * 2f32.powi(-9)).collect::<Vec<_>>());
                check(t, &values().map(|t| t * -0.0047).collect::<Vec<_>>());
                check(t, &vec![0.0; t.len()]);
            }
        }
    }
}
