//! Choosing an encoding, and turning a block of differences into it.

use crate::bf16::Work;
use crate::simd::Level;
use crate::simd::dispatch;

use super::moved::Moved;
use super::sparse::{ESCAPE_BF16, ESCAPE_CODE};

/// Elements that the choice looks at: tensors up to this size are looked at whole.
pub const SAMPLE: u64 = 1 << 16;

/// What the caller asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// The fewest bytes.
    Auto,
    /// Every element.
    Dense,
    /// Bitmap and values.
    Sparse,
}

/// How the values of a tensor are written.
#[derive(Debug, Clone)]
pub enum Codec {
    /// Every element, in the work type; narrowed to bf16 in the end if every one is exact in it.
    Dense,
    /// Codes into a palette.
    Palette(Box<Palette>),
    /// bf16 with escapes.
    Bf16,
    /// The work type.
    Plain,
    /// Nothing element by element: factors stand in another file already.
    LowRank,
}

/// Up to 255 values, and the code of each bf16.
#[derive(Debug, Clone)]
pub struct Palette {
    /// The values, most frequent first.
    pub values: Vec<f32>,
    codes: Box<[u8; 1 << 16]>,
}

/// What a sample of a tensor shows.
#[derive(Debug)]
pub struct Sample {
    seen: u64,
    moved: u64,
    /// Of those, how many are exact in bf16.
    short: u64,
    /// How often each bf16 value occurs.
    counts: Vec<u32>,
}

impl Default for Sample {
    fn default() -> Self {
        Self { seen: 0, moved: 0, short: 0, counts: vec![0; 1 << 16] }
    }
}

/// The upper half of a float's bits, if the lower half is empty: its bf16.
#[inline(always)]
fn short_bits(v: f32) -> Option<u16> {
    let bits = v.to_bits();
    (bits & 0xFFFF == 0 && v.is_finite()).then_some((bits >> 16) as u16)
}

impl Sample {
    /// Looks at those of so many differences that are not zero.
    pub fn look<W: Work>(&mut self, seen: usize, moved: &[W]) {
        self.seen += seen as u64;
        self.moved += moved.len() as u64;
        for v in moved {
            if let Some(bits) = short_bits(v.to_f64() as f32) {
                self.short += 1;
                self.counts[usize::from(bits)] += 1;
            }
        }
    }

    /// The codec with the fewest bytes among those that the caller allows. The sample is empty again then.
    pub fn choose(&mut self, choice: Choice, double: bool) -> Codec {
        let (looked, moved, short) = (self.seen.max(1) as f64, self.moved as f64, self.short as f64);
        (self.seen, self.moved, self.short) = (0, 0, 0);
        let frequent = self.frequent();
        let work = if double { 8.0 } else { 4.0 };
        if double {
            let sparse = looked / 8.0 + moved * work;
            let dense = choice == Choice::Dense || (choice == Choice::Auto && looked * work <= sparse);
            return if dense { Codec::Dense } else { Codec::Plain };
        }
        let coded = frequent.iter().map(|&(_, n)| f64::from(n)).sum::<f64>();
        let dense = looked * if short == moved { 2.0 } else { work };
        let bitmap = looked / 8.0;
        let costs = [
            bitmap + moved + 4.0 * (moved - coded) + 4.0 * frequent.len() as f64,
            bitmap + 2.0 * moved + 4.0 * (moved - short),
            bitmap + 4.0 * moved,
        ];
        let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
        match choice {
            Choice::Dense => Codec::Dense,
            Choice::Auto if dense <= least => Codec::Dense,
            _ if costs[0] == least => Codec::Palette(Box::new(Palette::of(&frequent))),
            _ if costs[1] == least => Codec::Bf16,
            _ => Codec::Plain,
        }
    }

    /// The 255 most frequent values and how often each was seen; among equals the smaller bits. Counts begin anew.
    fn frequent(&mut self) -> Vec<(u16, u32)> {
        let mut seen = Vec::new();
        for (i, counts) in self.counts.chunks_mut(64).enumerate() {
            // Most of what a format can say does not occur.
            if counts.iter().all(|&n| n == 0) {
                continue;
            }
            let own = counts.iter().enumerate().filter(|(_, n)| **n > 0);
            seen.extend(own.map(|(j, &n)| ((i * 64 + j) as u16, n)));
            counts.fill(0);
        }
        let rank = |&(bits, n): &(u16, u32)| (std::cmp::Reverse(n), bits);
        let kept = usize::from(ESCAPE_CODE);
        if seen.len() > kept {
            seen.select_nth_unstable_by_key(kept, rank);
            seen.truncate(kept);
        }
        seen.sort_unstable_by_key(rank);
        seen
    }
}

impl Palette {
    fn of(frequent: &[(u16, u32)]) -> Self {
        let mut codes = Box::new([ESCAPE_CODE; 1 << 16]);
        for (code, &(bits, _)) in frequent.iter().enumerate() {
            codes[usize::from(bits)] = code as u8;
        }
        Self { values: frequent.iter().map(|&(bits, _)| f32::from_bits(u32::from(bits) << 16)).collect(), codes }
    }
}

/// A tile, encoded.
#[derive(Debug, Default)]
pub struct Packed {
    /// One bit per element, in whole 64-bit words.
    pub bitmap: Vec<u8>,
    /// Values, as the codec writes them.
    pub values: Vec<u8>,
    /// Escapes, F32.
    pub escapes: Vec<u8>,
    /// Positions of corrections in their blocks, U32.
    pub wide_at: Vec<u8>,
    /// Corrections, F64.
    pub wide_lo: Vec<u8>,
    /// Values, escapes and corrections of each block.
    pub counts: Vec<[u64; 3]>,
    /// Sum of squares of each block.
    pub squares: Vec<f64>,
    /// Sum of squares of what a low-rank tensor leaves out of each block.
    pub residual: Vec<f64>,
    /// Non-zero differences.
    pub moved: u64,
    /// The largest, and where.
    pub max: f64,
    /// Its first position.
    pub max_at: Option<u64>,
    /// Elements that even a correction does not give back.
    pub inexact: u64,
    /// Whether some value is not exact in bf16.
    pub long: bool,
}

impl Packed {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        for v in [&mut self.bitmap, &mut self.values, &mut self.escapes, &mut self.wide_at, &mut self.wide_lo] {
            v.clear();
        }
        self.counts.clear();
        self.squares.clear();
        self.residual.clear();
        (self.moved, self.max, self.max_at, self.inexact, self.long) = (0, 0.0, None, 0, false);
    }

    /// Counts what moved of at most MICRO elements, and finds the largest, from an element on. Whether all are finite.
    pub fn measure<W: Work>(&mut self, level: Level, moved: &Moved<W>, from: u64) -> bool {
        let (max, finite) = dispatch::extreme(level, moved.values());
        if max.to_f64() > self.max {
            self.max = max.to_f64();
            let nth = moved.values().iter().position(|v| v.abs() == max);
            self.max_at = nth.map(|nth| from + moved.position(nth) as u64);
        }
        self.moved += moved.values().len() as u64;
        finite
    }

    /// Writes the values of at most MICRO differences, all for a dense tensor and otherwise those that moved, with their bitmap.
    pub fn pack<W: Work>(&mut self, level: Level, codec: &Codec, values: &[W], bits: &[u8]) {
        let single = |v: W| v.to_f64() as f32;
        match codec {
            Codec::Dense => {
                self.long |= size_of::<W>() == 4 && !values.iter().all(|&v| short_bits(single(v)).is_some());
                return put_work(&mut self.values, values);
            }
            Codec::LowRank => return,
            Codec::Palette(palette) => {
                let from = self.values.len();
                self.values.resize(from + values.len(), 0);
                let codes = &mut self.values[from..];
                dispatch::encode(level, codes, values, &palette.codes);
                escaped(codes, |at| self.escapes.extend_from_slice(&single(values[at]).to_le_bytes()));
            }
            Codec::Bf16 => put(&mut self.values, values, |v| {
                let short = short_bits(single(v));
                if short.is_none() {
                    self.escapes.extend_from_slice(&single(v).to_le_bytes());
                }
                short.unwrap_or(ESCAPE_BF16).to_le_bytes()
            }),
            Codec::Plain => put_work(&mut self.values, values),
        }
        self.bitmap.extend_from_slice(bits);
    }
}

/// Where the escapes are among codes, in order. One in a hundred is, so eight are looked at at a time: to search for each takes half as long again.
#[inline(always)]
fn escaped(codes: &[u8], mut found: impl FnMut(usize)) {
    const LOW: u64 = u64::from_le_bytes([0x7F; 8]);
    let (words, rest) = codes.as_chunks();
    for (i, &word) in words.iter().enumerate() {
        // The high bit of every byte that is all ones.
        let word = u64::from_le_bytes(word);
        let mut escapes = ((word & LOW) + u64::from_le_bytes([1; 8])) & word & !LOW;
        while escapes != 0 {
            found(i * 8 + escapes.trailing_zeros() as usize / 8);
            escapes &= escapes - 1;
        }
    }
    let from = codes.len() - rest.len();
    rest.iter().enumerate().filter(|(_, code)| **code == ESCAPE_CODE).for_each(|(i, _)| found(from + i));
}

/// Appends what becomes of each value.
#[inline(always)]
fn put<W: Copy, const N: usize>(bytes: &mut Vec<u8>, values: &[W], mut encode: impl FnMut(W) -> [u8; N]) {
    let from = bytes.len();
    bytes.resize(from + values.len() * N, 0);
    for (o, &v) in bytes[from..].as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *o = encode(v);
    }
}

/// Appends values as they are.
fn put_work<W: Work>(bytes: &mut Vec<u8>, values: &[W]) {
    if size_of::<W>() == 8 {
        put(bytes, values, |v| v.to_f64().to_le_bytes());
    } else {
        put(bytes, values, |v| (v.to_f64() as f32).to_le_bytes());
    }
}

impl Codec {
    /// Bytes of one value.
    pub fn value_size(&self, double: bool) -> u64 {
        match self {
            Self::Palette(_) => 1,
            Self::Bf16 => 2,
            Self::LowRank => 1,
            Self::Dense | Self::Plain => {
                if double {
                    8
                } else {
                    4
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_escape_is_found_in_order(codes in prop::collection::vec(prop_oneof![Just(ESCAPE_CODE), Just(0x7F), Just(0x80), any::<u8>()], 0..100)) {
            let mut found = Vec::new();
            escaped(&codes, |at| found.push(at));
            prop_assert_eq!(found, (0..codes.len()).filter(|&at| codes[at] == ESCAPE_CODE).collect::<Vec<_>>());
        }
    }
}
