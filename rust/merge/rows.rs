//! What is computed of one whole row: ranks of magnitudes, and the divergence of two rows of logits.

use crate::bf16::Work;
use crate::philox::ln;
use crate::simd::Level;
use crate::simd::dispatch::{self, MICRO};
use crate::stream::BLOCK;

/// Rows shorter than this are not worth a radix sort.
const SHORT: usize = 256;
const DIGIT: u32 = 11;

/// The rank of every element by falling magnitude, of equals the lowest index first, into `ranks`.
pub(super) fn order<W: Work>(row: &[W], ranks: &mut Vec<u64>, sorted: &mut Vec<u64>) {
    let n = row.len();
    ranks.clear();
    sorted.clear();
    if size_of::<W>() == 8 || n < SHORT || n > u32::MAX as usize {
        sorted.extend(0..n as u64);
        sorted.sort_by(|&a, &b| row[b as usize].magnitude().cmp(&row[a as usize].magnitude()));
        ranks.resize(n, 0);
    } else {
        // The key's complement, which rises where magnitudes fall, and the index below it.
        let word = |(i, x): (usize, &W)| {
            let key: u64 = x.magnitude().into();
            (u64::from(u32::MAX >> 1) - key) << 32 | i as u64
        };
        sorted.extend(row.iter().enumerate().map(word));
        ranks.resize(n, 0);
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
                ranks[*slot as usize] = word;
                *slot += 1;
            }
            std::mem::swap(sorted, ranks);
        }
    }
    for (rank, &word) in sorted.iter().enumerate() {
        ranks[(word & u64::from(u32::MAX)) as usize] = rank as u64;
    }
}

/// The sum of `a * b` in the fixed order, beginning anew with the row.
fn dot(level: Level, a: &[f64], b: &[f64]) -> f64 {
    let block = |(a, b): (&[f64], &[f64])| {
        a.chunks(MICRO).zip(b.chunks(MICRO)).fold(0.0, |sum, (a, b)| sum + dispatch::dot(level, a, b))
    };
    a.chunks(BLOCK as usize).zip(b.chunks(BLOCK as usize)).fold(0.0, |sum, pair| sum + block(pair))
}

/// `KL(softmax(y) || softmax(x))`, at least 0: with the largest elements `m_x` and `m_y` and `e_y = exp(y - m_y)`,
/// `sum(e_y (y - x)) / sum(e_y) - ((m_y - m_x) + (ln sum(e_y) - ln sum(e_x)))`. The buffers are used up.
pub(super) fn divergence(level: Level, x: &mut [f64], y: &mut [f64]) -> f64 {
    let largest = |v: &[f64]| v.iter().fold(f64::NEG_INFINITY, |m, &x| if x > m { x } else { m });
    let (m_x, m_y) = (largest(x), largest(y));
    let ones = vec![1.0; x.len().min(BLOCK as usize)];
    let ones: &[f64] = &ones;
    let total = |v: &[f64]| {
        v.chunks(BLOCK as usize).fold(0.0, |sum, block| {
            sum + block.chunks(MICRO).fold(0.0, |sum, v| sum + dispatch::dot(level, v, &ones[..v.len()]))
        })
    };
    let apart: Vec<f64> = y.iter().zip(x.iter()).map(|(y, x)| y - x).collect();
    for (v, m) in [(&mut *x, m_x), (&mut *y, m_y)] {
        v.chunks_mut(MICRO).for_each(|v| dispatch::exp_less(level, v, m));
    }
    let (z_x, z_y) = (total(x), total(y));
    let shift = (m_y - m_x) + (ln(z_y) - ln(z_x));
    let found = dot(level, y, &apart) / z_y - shift;
    // Not `max`, which would take a NaN for a zero.
    if found < 0.0 { 0.0 } else { found }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_are_those_of_a_stable_sort(steps in prop::collection::vec(-40i32..40, 1..3000)) {
            let row: Vec<f32> = steps.iter().map(|&s| s as f32 * 0.01).collect();
            let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let mut expected: Vec<usize> = (0..row.len()).collect();
            expected.sort_by(|&a, &b| row[b].abs().total_cmp(&row[a].abs()));
            let (mut ranks, mut sorted) = (Vec::new(), Vec::new());
            for single in [true, false] {
                if single { order(&row, &mut ranks, &mut sorted) } else { order(&wide, &mut ranks, &mut sorted) }
                prop_assert!(expected.iter().enumerate().all(|(rank, &i)| ranks[i] == rank as u64));
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
            assert!((divergence(level, &mut x.clone(), &mut y.clone()) - expected).abs() < 1e-12);
            assert_eq!(divergence(level, &mut x.clone(), &mut x.clone()), 0.0);
        }
    }
}
