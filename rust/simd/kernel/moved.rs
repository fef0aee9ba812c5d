//! What a sparse vector is made of: which elements moved, their values, and the proof that they lead back.

use super::measure::dot;
use super::{elements, filled};
use crate::bf16::{Element, Work};

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

/// Elements of [`pick`] that are written before anybody counts: in a tensor that RL moved, a word of 64 seldom has more.
const LIKELY: usize = 12;

/// Writes the elements whose bits are set (as [`extent`] writes them) one behind the other; how many. `into` has room for all of `x` and 64 more.
///
/// Every word writes the same number of elements first, set or not, and the next one begins behind those that count: where a word ends is
/// not to be guessed, and a wrong guess costs as much as ten elements.
#[inline(always)]
pub fn pick<W: Work>(into: &mut [W], bits: &[u8], x: &[W]) -> usize {
    let mut at = 0;
    let (whole, rest) = x.as_chunks::<64>();
    let (words, last) = bits.split_at(whole.len() * 8);
    for (bytes, x) in words.as_chunks::<8>().0.iter().zip(whole) {
        at += pick_word(&mut into[at..], u64::from_le_bytes(*bytes), x);
    }
    if let (Some(bytes), false) = (last.first_chunk(), rest.is_empty()) {
        at += pick_word(&mut into[at..], u64::from_le_bytes(*bytes), &filled(rest));
    }
    at
}

#[inline(always)]
fn pick_word<W: Work>(into: &mut [W], mut word: u64, x: &[W; 64]) -> usize {
    let Some(into) = into.first_chunk_mut::<64>() else { return 0 };
    let count = word.count_ones() as usize;
    let (likely, more) = into.split_at_mut(LIKELY);
    for o in likely {
        *o = x[word.trailing_zeros() as usize % 64];
        word &= word.wrapping_sub(1);
    }
    for o in more {
        if word == 0 {
            break;
        }
        *o = x[word.trailing_zeros() as usize % 64];
        word &= word - 1;
    }
    count
}

/// Whether `n + u`, or `n` where `u` is zero, is `p` bit for bit, for every element: then nothing needs rounding, and [`finish`] gives `p` back
/// (but for which NaN a NaN is). Where this says no, [`finish`] may still do so, because it rounds.
#[inline(always)]
pub fn rebuilds<E: Element, W: Work>(p: &[u8], n: &[u8], u: &[W]) -> bool {
    let mut differs = W::Magnitude::default();
    for ((p, n), &u) in elements::<E>(p).zip(elements::<E>(n)).zip(u) {
        let n = W::widen(n);
        let sum = if u == W::ZERO { n } else { n + u };
        differs = differs | (sum.bits() ^ W::widen(p).bits());
    }
    differs == W::Magnitude::default()
}
