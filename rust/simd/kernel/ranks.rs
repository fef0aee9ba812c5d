//! Ranks by counting: magnitudes as buckets.

use crate::bf16::Work;

/// Magnitudes of an f32 as keys; the largest.
#[inline(always)]
pub fn keys<W: Work>(into: &mut [u32], x: &[W]) -> u32 {
    let mut largest = 0;
    for (into, x) in into.iter_mut().zip(x) {
        let key: u64 = x.magnitude().into();
        *into = key as u32;
        largest = largest.max(key as u32);
    }
    largest
}

/// Turns keys into buckets: 0 for zeros, 1 for what is not above `lowest`, one more for every `1 << shift` keys from there. Sets a bit in `some` for each that is
/// no zero, and in `odd` for each that may share its bucket with other keys. Whole groups of 64.
#[inline(always)]
pub fn buckets(keys: &mut [u32], some: &mut [u64], odd: &mut [u64], shift: u32, lowest: u32) {
    let rest = (1u32 << shift) - 1;
    let groups = keys.as_chunks_mut::<64>().0.iter_mut();
    for ((keys, some), odd) in groups.zip(some).zip(odd) {
        let (mut found, mut between) = (0u64, 0u64);
        for (j, &key) in keys.iter().enumerate() {
            found |= u64::from(key != 0) << j;
        }
        for (j, &key) in keys.iter().enumerate() {
            between |= u64::from((key != 0) & ((key & rest != 0) | (key >> shift < lowest))) << j;
        }
        for key in keys.iter_mut() {
            let bucket = (*key >> shift).max(lowest) - lowest + 1;
            *key = if *key == 0 { 0 } else { bucket };
        }
        (*some, *odd) = (found, between);
    }
}

/// The places of set bits.
#[inline(always)]
fn each_set(word: u64, mut with: impl FnMut(usize)) {
    let mut left = word;
    while left != 0 {
        with(left.trailing_zeros() as usize % 64);
        left &= left - 1;
    }
}

/// Counts buckets, of the elements whose bit is set. Whole groups of 64.
#[inline(always)]
pub fn tally(counts: &mut [u32], buckets: &[u32], some: &[u64]) {
    for (buckets, &some) in buckets.as_chunks::<64>().0.iter().zip(some) {
        each_set(some, |j| counts[buckets[j] as usize] += 1);
    }
}

/// What [`mark`] sets.
const MARK: u32 = 1 << 31;

/// Marks the buckets of the elements whose bit is set. Whole groups of 64.
#[inline(always)]
pub fn mark(counts: &mut [u32], buckets: &[u32], odd: &[u64]) {
    for (buckets, &odd) in buckets.as_chunks::<64>().0.iter().zip(odd) {
        each_set(odd, |j| counts[buckets[j] as usize] |= MARK);
    }
}

/// Gives each element whose bit is set the next number of its bucket, and lists those in marked buckets, for which there must be room. How many those
/// are. Whole groups of 64, in whose ranks nothing is marked.
#[inline(always)]
pub fn rank(ranks: &mut [u32], mixed: &mut [u32], counts: &mut [u32], buckets: &[u32], some: &[u64]) -> usize {
    let mut found = 0;
    let groups = ranks.as_chunks_mut::<64>().0.iter_mut().zip(buckets.as_chunks::<64>().0);
    for (group, ((ranks, buckets), &some)) in groups.zip(some).enumerate() {
        let mut any = 0;
        each_set(some, |j| {
            let next = &mut counts[buckets[j] as usize];
            let rank = *next;
            *next = rank + 1;
            ranks[j] = rank;
            any |= rank;
        });
        if any < MARK {
            continue;
        }
        let mut marked = 0u64;
        for (j, &rank) in ranks.iter().enumerate() {
            marked |= u64::from(rank >= MARK) << j;
        }
        each_set(marked, |j| {
            ranks[j] &= MARK - 1;
            mixed[found] = (group * 64 + j) as u32;
            found += 1;
        });
    }
    found
}

/// What terms say of the ranks of elements whose bit is set. Whole groups of 64.
#[inline(always)]
pub fn look_up<W: Work>(lasts: &mut [u32], shares: &mut [W], ranks: &[u32], terms: &[(u32, W)], some: &[u64]) {
    let groups = lasts.as_chunks_mut::<64>().0.iter_mut().zip(shares.as_chunks_mut::<64>().0);
    for (((lasts, shares), ranks), &some) in groups.zip(ranks.as_chunks::<64>().0).zip(some) {
        each_set(some, |j| (lasts[j], shares[j]) = terms[ranks[j] as usize]);
    }
}
