//! What a sparse vector is made of: which elements moved, their values, and the proof that they lead back.

use super::measure::{dot, largest};
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

/// Looks at at most MICRO elements.
#[inline(always)]
pub fn extent<W: Work>(x: &[W]) -> Extent<W> {
    let (max, finite) = extreme(x);
    let moved = x.iter().map(|&x| u64::from(x != W::ZERO)).sum();
    Extent { max, moved, finite, squares: if moved == 0 { 0.0 } else { dot(x, x) } }
}

/// The largest absolute value, and whether all are finite; what is not a number does not count.
#[inline(always)]
pub fn extreme<W: Work>(x: &[W]) -> (W, bool) {
    let max = W::from_magnitude(largest(x));
    if max.is_finite() {
        return (max, true);
    }
    (x.iter().fold(W::ZERO, |m, x| if x.abs() > m { x.abs() } else { m }), false)
}

/// Writes one bit for each of at most MICRO elements, set where it is not zero (bit `i % 8` of byte `i / 8`; whole 64-bit words). How many are.
/// `word` makes the bits of 64, as [`flag_word`] does.
#[inline(always)]
pub fn flag<W: Work>(bits: &mut [u8], x: &[W], word: impl Fn(&[W; 64]) -> u64) -> u64 {
    let (whole, rest) = x.as_chunks::<64>();
    let rest = (!rest.is_empty()).then(|| filled(rest));
    let mut moved = 0;
    for (bytes, x) in bits.as_chunks_mut::<8>().0.iter_mut().zip(whole.iter().chain(&rest)) {
        let word = word(x);
        *bytes = word.to_le_bytes();
        moved += word.count_ones();
    }
    u64::from(moved)
}

/// The bits of [`flag`].
#[inline(always)]
pub fn flag_word<W: Work>(x: &[W; 64]) -> u64 {
    x.iter().enumerate().fold(0, |word, (j, &x)| word | u64::from(x != W::ZERO) << j)
}

/// An element of a 16-bit format, as it is stored.
pub type Half = [u8; 2];

/// Finds where two tensors of one 16-bit format differ in bits: [`flag`]s them, and writes what each tensor has there one behind the other, as
/// [`pick`] does. How many do. `word` does so for 64.
#[inline(always)]
pub fn differing(
    bits: &mut [u8],
    [into_p, into_n]: [&mut [Half]; 2],
    [p, n]: [&[Half]; 2],
    mut word: impl FnMut([&mut [Half; 64]; 2], [&[Half; 64]; 2]) -> u64,
) -> usize {
    let ((whole_p, rest_p), (whole_n, rest_n)) = (p.as_chunks::<64>(), n.as_chunks::<64>());
    let filled = |rest: &[Half]| {
        let mut all = [[0; 2]; 64];
        all[..rest.len()].copy_from_slice(rest);
        all
    };
    let rest = [filled(rest_p), filled(rest_n)];
    let last = (!rest_p.is_empty()).then_some((&rest[0], &rest[1]));
    let mut at = 0;
    for (bytes, (p, n)) in bits.as_chunks_mut::<8>().0.iter_mut().zip(whole_p.iter().zip(whole_n).chain(last)) {
        if let (Some(into_p), Some(into_n)) = (into_p[at..].first_chunk_mut(), into_n[at..].first_chunk_mut()) {
            let word = word([into_p, into_n], [p, n]);
            *bytes = word.to_le_bytes();
            at += word.count_ones() as usize;
        }
    }
    at
}

/// What [`differing`] writes of 64 elements, of which these differ.
#[inline(always)]
pub fn pick_pair([into_p, into_n]: [&mut [Half; 64]; 2], [p, n]: [&[Half; 64]; 2], word: u64) {
    pick_word(into_p, word, p);
    pick_word(into_n, word, n);
}

/// The bits of elements that differ.
#[inline(always)]
pub fn differ_word(p: &[Half; 64], n: &[Half; 64]) -> u64 {
    p.iter().zip(n).enumerate().fold(0, |word, (j, (p, n))| word | u64::from(p != n) << j)
}

/// The largest magnitude, as the bits of an integer.
#[inline(always)]
pub fn largest_half(x: &[Half]) -> u16 {
    x.iter().fold(0, |largest, &x| largest.max(u16::from_le_bytes(x) & 0x7FFF))
}

/// Elements of [`pick`] that are written before anybody counts: in a tensor that RL moved, a word of 64 seldom has more.
const LIKELY: usize = 12;

/// Writes the elements whose bits are set (as [`flag`] writes them) one behind the other; how many. `into` has room for all of `x` and 64 more.
///
/// Every word writes the same number of elements first, set or not, and the next one begins behind those that count: where a word ends is
/// not to be guessed, and a wrong guess costs as much as ten elements.
#[inline(always)]
pub fn pick<W: Work>(
    into: &mut [W],
    bits: &[u8],
    x: &[W],
    word: impl Fn(&mut [W; 64], u64, &[W; 64]) -> usize,
) -> usize {
    let mut at = 0;
    let (whole, rest) = x.as_chunks::<64>();
    let (words, last) = bits.split_at(whole.len() * 8);
    let mut pick = |bytes: &[u8; 8], x: &[W; 64]| {
        if let Some(into) = into[at..].first_chunk_mut() {
            at += word(into, u64::from_le_bytes(*bytes), x);
        }
    };
    for (bytes, x) in words.as_chunks::<8>().0.iter().zip(whole) {
        pick(bytes, x);
    }
    if let (Some(bytes), false) = (last.first_chunk(), rest.is_empty()) {
        pick(bytes, &filled(rest));
    }
    at
}

/// [`pick`] for 64 elements.
#[inline(always)]
pub fn pick_word<T: Copy>(into: &mut [T; 64], mut word: u64, x: &[T; 64]) -> usize {
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

/// The code of each value: by the upper half of its bits as an f32, and the last of the table, which is a NaN's, where the lower half is not empty.
///
/// What can be done to many at a time goes before what cannot: the table.
#[inline(always)]
pub fn encode<W: Work>(codes: &mut [u8], values: &[W], table: &[u8; 1 << 16]) {
    let mut keys = [0; KEYS];
    for (codes, values) in codes.chunks_mut(KEYS).zip(values.chunks(KEYS)) {
        for (key, &v) in keys.iter_mut().zip(values) {
            let bits = (v.to_f64() as f32).to_bits();
            *key = (bits >> 16) as u16 | if bits & 0xFFFF == 0 { 0 } else { u16::MAX };
        }
        for (code, &key) in codes.iter_mut().zip(&keys) {
            *code = table[usize::from(key)];
        }
    }
}

/// Values that [`encode`] makes keys of before it looks them up.
const KEYS: usize = 256;
