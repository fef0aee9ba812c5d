//! What a sparse vector is made of: which elements moved, their values, and the proof that they lead back.

use super::measure::{dot, dot_again, holds, join, largest};
use super::{GROUP, LANES, MICRO, elements, filled};
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

/// What there is to know of the differences of two tensors of one format.
#[derive(Debug, Clone, Copy)]
pub struct Moves {
    /// Sum of squares, in the order of [`dot`]. Not finite if some difference is not.
    pub squares: f64,
    /// What [`rebuilds`] says.
    pub rebuilds: bool,
}

/// `u = p - n` for at most MICRO elements: what [`difference`](super::difference), [`dot`] and [`rebuilds`] do together, in one walk.
#[inline(always)]
pub fn moves<E: Element, W: Work>(u: &mut [W], p: &[u8], n: &[u8]) -> Moves {
    let mut differs = [W::Magnitude::default(); LANES];
    // Summed behind the loop: in it, compilers take the lanes apart.
    let mut fours = [[W::ZERO; LANES]; MICRO / GROUP];
    let groups = u.len().div_ceil(GROUP);
    let (whole, rest) = u.as_chunks_mut::<GROUP>();
    let size = GROUP * E::SIZE;
    for (((u, fours), p), n) in whole.iter_mut().zip(&mut fours).zip(p.chunks_exact(size)).zip(n.chunks_exact(size)) {
        let at = |bytes: &[u8], i: usize| W::widen(E::load(&bytes[i * E::SIZE..(i + 1) * E::SIZE]));
        *fours = move_group(u, &mut differs, |i| (at(p, i), at(n, i)));
    }
    if let (false, Some(fours)) = (rest.is_empty(), fours.get_mut(groups - 1)) {
        let widened = |bytes: &[u8]| {
            let mut group = [W::ZERO; GROUP];
            let from = whole.len() * size;
            group.iter_mut().zip(elements::<E>(&bytes[from..])).for_each(|(w, e)| *w = W::widen(e));
            group
        };
        let (p, n, mut group) = (widened(p), widened(n), [W::ZERO; GROUP]);
        *fours = move_group(&mut group, &mut differs, |i| (p[i], n[i]));
        rest.copy_from_slice(&group[..rest.len()]);
    }
    let mut lanes = [0.0; LANES];
    for fours in &fours[..groups] {
        for j in 0..LANES {
            lanes[j] += fours[j].to_f64();
        }
    }
    let differs = differs.iter().fold(W::Magnitude::default(), |all, &d| all | d);
    let found = join(&lanes);
    let squares = if holds::<W>(found) { found } else { dot_again(u, u, found) };
    Moves { squares, rebuilds: differs == W::Magnitude::default() }
}

/// A group of [`moves`]: the differences, and the sums of four squares each.
#[inline(always)]
fn move_group<W: Work>(
    u: &mut [W; GROUP],
    differs: &mut [W::Magnitude; LANES],
    pair: impl Fn(usize) -> (W, W),
) -> [W; LANES] {
    let mut squares = [[W::ZERO; LANES]; GROUP / LANES];
    for (q, squares) in squares.iter_mut().enumerate() {
        for j in 0..LANES {
            let (p, n) = pair(q * LANES + j);
            let d = p - n;
            u[q * LANES + j] = d;
            let sum = if d == W::ZERO { n } else { n + d };
            differs[j] = differs[j] | (sum.bits() ^ p.bits());
            squares[j] = d * d;
        }
    }
    std::array::from_fn(|j| (squares[0][j] + squares[1][j]) + (squares[2][j] + squares[3][j]))
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
pub fn pick_word<W: Work>(into: &mut [W; 64], mut word: u64, x: &[W; 64]) -> usize {
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

/// The code of each value: by the upper half of its bits as an f32, and all bits set where the lower half is not empty.
///
/// What can be done to many at a time goes before and after what cannot: the table.
#[inline(always)]
pub fn encode<W: Work>(codes: &mut [u8], values: &[W], table: &[u8; 1 << 16]) {
    let ((whole, rest), (codes, last)) = (values.as_chunks::<GROUP>(), codes.as_chunks_mut::<GROUP>());
    for (codes, values) in codes.iter_mut().zip(whole) {
        *codes = encode_group(values, table);
    }
    last.copy_from_slice(&encode_group(&filled(rest), table)[..rest.len()]);
}

#[inline(always)]
fn encode_group<W: Work>(values: &[W; GROUP], table: &[u8; 1 << 16]) -> [u8; GROUP] {
    let (mut keys, mut codes) = ([0u16; GROUP], [0u8; GROUP]);
    let bits = |v: W| (v.to_f64() as f32).to_bits();
    for (key, &v) in keys.iter_mut().zip(values) {
        *key = (bits(v) >> 16) as u16;
    }
    for (code, key) in codes.iter_mut().zip(keys) {
        *code = table[usize::from(key)];
    }
    for (code, &v) in codes.iter_mut().zip(values) {
        *code |= if bits(v) & 0xFFFF == 0 { 0 } else { u8::MAX };
    }
    codes
}
