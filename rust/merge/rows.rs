//! What is computed of one whole row: ranks of magnitudes, and the divergence of two rows of logits.

use crate::bf16::Work;
use crate::philox::{ln, ln_1p};
use crate::simd::Level;
use crate::simd::dispatch::{self, LANES, MICRO, NEAR, join};
use crate::stream::BLOCK;

/// Rows shorter than this are sorted by comparison.
const SHORT: usize = 256;
/// Of the powers of two below the largest magnitude, those that have buckets of their own.
const OCTAVES: u32 = 6;
const DIGIT: u32 = 11;

/// Ranks by falling magnitude, of equals the lowest index first. The differences of 16-bit formats have few values, so most buckets of magnitudes hold one,
/// and ranks are a matter of counting; only what shares its bucket with other values is sorted.
#[derive(Debug, Default)]
pub(super) struct Ranks {
    /// What [`Ranks::find`] found, in whole groups of 64. Where the magnitude is zero it may be any number below the row's length.
    pub(super) ranks: Vec<u32>,
    /// A bit for each element, in words of 64, that is unset only where the magnitude is zero.
    pub(super) some: Vec<u64>,
    buckets: Vec<u32>,
    odd: Vec<u64>,
    counts: Vec<u32>,
    mixed: Vec<u32>,
    words: Vec<u64>,
    sorted: Vec<u64>,
}

impl Ranks {
    /// Bytes for rows of a length.
    pub(super) fn memory(row: u64) -> u64 {
        row.next_multiple_of(64) * 29 + u64::from(OCTAVES << 10) * 4
    }

    /// Ranks the elements of a row of at most 2^31.
    pub(super) fn find<W: Work>(&mut self, level: Level, row: &[W]) {
        let n = row.len();
        let room = n.next_multiple_of(64);
        if self.ranks.len() != room {
            self.ranks.clear();
            self.ranks.resize(room, 0);
        }
        if size_of::<W>() == 8 || n < SHORT {
            self.sorted.clear();
            self.sorted.extend(0..n as u64);
            self.sorted.sort_by(|&a, &b| row[b as usize].magnitude().cmp(&row[a as usize].magnitude()));
        } else if self.count(level, row) {
            return;
        } else {
            self.sort(row);
        }
        self.some.clear();
        self.some.resize(room / 64, u64::MAX);
        if let Some(last) = self.some.last_mut() {
            *last >>= room - n;
        }
        for (rank, &word) in self.sorted.iter().enumerate() {
            self.ranks[(word & u64::from(u32::MAX)) as usize] = rank as u32;
        }
    }

    /// By counting; whether that was possible.
    fn count<W: Work>(&mut self, level: Level, row: &[W]) -> bool {
        let Self { ranks, buckets, some, odd, counts, mixed, words, .. } = self;
        let (n, groups) = (row.len(), row.len().div_ceil(64));
        buckets.resize(groups * 64, 0);
        buckets[n..].fill(0);
        some.resize(groups, 0);
        odd.resize(groups, 0);
        let mut largest = 0;
        for (buckets, row) in buckets.chunks_mut(MICRO).zip(row.chunks(MICRO)) {
            largest = largest.max(dispatch::keys(level, buckets, row));
        }
        // As many buckets as a row of differences has values, more or less.
        let shift = 16 - (n / 3072).min(2) as u32;
        let lowest = (largest >> shift).saturating_sub(OCTAVES << (23 - shift));
        let all = (largest >> shift) - lowest + 2;
        dispatch::buckets(level, buckets, some, odd, shift, lowest);
        counts.clear();
        counts.resize(all as usize, 0);
        dispatch::tally(level, counts, buckets, some);
        let mut before = 0;
        for count in counts.iter_mut().rev() {
            before += std::mem::replace(count, before);
        }
        dispatch::mark(level, counts, buckets, odd);
        mixed.resize(n, 0);
        let found = dispatch::rank(level, ranks, mixed, counts, buckets, some);
        if found > n / 4 {
            return false;
        }
        let word = |&i: &u32| {
            let key: u64 = row[i as usize].magnitude().into();
            (u64::from(u32::MAX) - key) << 32 | u64::from(i)
        };
        words.clear();
        words.extend(mixed[..found].iter().map(word));
        words.sort_unstable();
        // The counts have reached the end of their buckets.
        let place = |word: u64| (word & u64::from(u32::MAX)) as usize;
        for equals in words.chunk_by(|&a, &b| buckets[place(a)] == buckets[place(b)]) {
            let end = counts[buckets[place(equals[0])] as usize] & (u32::MAX >> 1);
            let from = end - equals.len() as u32;
            for (rank, &word) in (from..).zip(equals) {
                ranks[place(word)] = rank;
            }
        }
        true
    }

    /// By sorting digits.
    fn sort<W: Work>(&mut self, row: &[W]) {
        let Self { words, sorted, .. } = self;
        // The key's complement, which rises where magnitudes fall, and the index below it.
        let word = |(i, x): (usize, &W)| {
            let key: u64 = x.magnitude().into();
            (u64::from(u32::MAX >> 1) - key) << 32 | i as u64
        };
        sorted.clear();
        sorted.extend(row.iter().enumerate().map(word));
        words.resize(row.len(), 0);
        let mut counts = [[0u32; 1 << DIGIT]; 3];
        let digit = |word: u64, place: usize| (word >> (32 + DIGIT * place as u32)) as usize & ((1 << DIGIT) - 1);
        for &word in sorted.iter() {
            for (place, counts) in counts.iter_mut().enumerate() {
                counts[digit(word, place)] += 1;
            }
        }
        for (place, counts) in counts.iter_mut().enumerate() {
            let mut before = 0;
            for count in counts.iter_mut() {
                before += std::mem::replace(count, before);
            }
            for &word in sorted.iter() {
                let slot = &mut counts[digit(word, place)];
                words[*slot as usize] = word;
                *slot += 1;
            }
            std::mem::swap(sorted, words);
        }
    }
}

/// `KL(softmax(y) || softmax(x))`, at least 0: with the largest elements `m_x` and `m_y`, `e_x = exp(x - m_x)` and `e_y = exp(y - m_y)`,
/// `sum(e_y (y - x)) / sum(e_y) - ((m_y - m_x) + (ln sum(e_y) - ln sum(e_x)))`. Where all of `d = y - x` is near zero, that is a small difference of
/// large numbers, and with `g = e_x (exp d - 1)` it is `sum((e_x + g) d) / (sum(e_x) + sum(g)) - ln(1 + sum(g) / sum(e_x))`. Sums are in the fixed order,
/// beginning anew with the row.
pub(super) fn divergence<W: Work>(level: Level, x: &[W], y: &[W]) -> f64 {
    let (highest, farthest) = dispatch::reach(level, x, y);
    let m_x = highest.to_f64();
    let found = if farthest < W::from_f64(NEAR).magnitude() {
        let [z, g, apart] = row_sums(x, y, |sums, x, y| dispatch::add_near_weights(level, sums, x, y, m_x));
        apart / (z + g) - ln_1p(g / z)
    } else {
        let m_y = dispatch::highest(level, y).to_f64();
        let [z_x, z_y, apart] = row_sums(x, y, |sums, x, y| dispatch::add_weights(level, sums, x, y, [m_x, m_y]));
        apart / z_y - ((m_y - m_x) + (ln(z_y) - ln(z_x)))
    };
    // Not `max`, which would take a NaN for a zero.
    if found < 0.0 { 0.0 } else { found }
}

/// Sums over two rows, from what adds those of a MICRO to the lanes.
fn row_sums<W: Work>(x: &[W], y: &[W], add: impl Fn(&mut [[f64; LANES]; 3], &[W], &[W])) -> [f64; 3] {
    let mut sums = [0.0; 3];
    for (x, y) in x.chunks(BLOCK as usize).zip(y.chunks(BLOCK as usize)) {
        let mut of_block = [0.0; 3];
        for (x, y) in x.chunks(MICRO).zip(y.chunks(MICRO)) {
            let mut lanes = [[0.0; LANES]; 3];
            add(&mut lanes, x, y);
            of_block.iter_mut().zip(&lanes).for_each(|(sum, lanes)| *sum += join(lanes));
        }
        sums.iter_mut().zip(of_block).for_each(|(sum, of_block)| *sum += of_block);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_are_those_of_a_stable_sort(seed in 0u64..1 << 40, n in 1usize..9000, kind in 0u8..5) {
            let normal = crate::philox::Philox::new(seed, "rows", 3);
            let short = |x: f64| f32::from_bits((x as f32).to_bits() & 0xFFFF_0000);
            let value = |i: u64| {
                let [a, b] = normal.normal_pair(i);
                match kind {
                    // Every value another: more to sort than to count.
                    0 => a as f32,
                    // What two models in a 16-bit format differ by.
                    1 => short(a * 0.02 + b * 0.0005) - short(a * 0.02),
                    // Mostly zeros of both signs.
                    2 if !i.is_multiple_of(9) => 0.0 * a as f32,
                    // Much smaller than the largest.
                    3 if !i.is_multiple_of(5) => (a * 1e-9) as f32,
                    4 => (a * 3.0).round() as f32 * 0.01,
                    _ => short(b),
                }
            };
            let row: Vec<f32> = (0..n as u64).map(value).collect();
            let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let mut expected: Vec<usize> = (0..row.len()).collect();
            expected.sort_by(|&a, &b| row[b].abs().total_cmp(&row[a].abs()));
            let mut found = Ranks::default();
            for single in Level::available().into_iter().map(Some).chain([None]) {
                match single {
                    Some(level) => found.find(level, &row),
                    None => found.find(Level::portable(), &wide),
                }
                prop_assert!(expected.iter().enumerate().all(|(rank, &i)| row[i] == 0.0 || found.ranks[i] == rank as u32));
            }
        }
    }

    #[test]
    fn the_divergence_is_that_of_two_distributions() {
        let (x, y) = ([0.1, -0.4, 2.0, 0.0], [0.3, -0.2, 1.0, 5.0]);
        let softmax = |v: &[f64]| {
            let z: f64 = v.iter().map(|x| x.exp()).sum();
            v.iter().map(|x| x.exp() / z).collect::<Vec<_>>()
        };
        let (p, q) = (softmax(&y), softmax(&x));
        let expected: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        for level in Level::available() {
            assert!((divergence(level, &x, &y) - expected).abs() < 1e-12);
            assert_eq!(divergence(level, &x, &x), 0.0);
        }
    }
}
