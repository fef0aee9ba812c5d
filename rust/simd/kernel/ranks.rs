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

/// The indices of set bits.
#[inline(always)]
fn each_set(bits: &[u64], mut with: impl FnMut(usize)) {
    for (i, &word) in bits.iter().enumerate() {
        let mut left = word;
        while left != 0 {
            with(i * 64 + left.trailing_zeros() as usize);
            left &= left - 1;
        }
    }
}

/// Counts buckets, of the elements whose bit is set.
#[inline(always)]
pub fn tally(counts: &mut [u32], buckets: &[u32], some: &[u64]) {
    each_set(some, |i| counts[buckets[i] as usize] += 1);
}

/// What [`mark`] sets.
const MARK: u32 = 1 << 31;

/// Marks the buckets of the elements whose bit is set.
#[inline(always)]
pub fn mark(counts: &mut [u32], buckets: &[u32], odd: &[u64]) {
    each_set(odd, |i| counts[buckets[i] as usize] |= MARK);
}

/// Gives each element whose bit is set the next number of its bucket, and lists those in marked buckets, for which there must be room for one more than
/// there are. How many those are.
#[inline(always)]
pub fn rank(ranks: &mut [u32], mixed: &mut [u32], counts: &mut [u32], buckets: &[u32], some: &[u64]) -> usize {
    let mut found = 0;
    each_set(some, |i| {
        let next = &mut counts[buckets[i] as usize];
        let rank = *next;
        *next = rank + 1;
        ranks[i] = rank & (MARK - 1);
        mixed[found] = i as u32;
        found += (rank / MARK) as usize;
    });
    found
}
