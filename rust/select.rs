//! Exact order statistics of a stream: which magnitude is the k-th largest, and which of its equals belong to the k.
//!
//! Magnitudes sort as their bits do, so they are searched as whole numbers ("keys"). An even sample brackets the key; one pass over the
//! stream counts what is above the bracket and makes a histogram of the little that is inside it. If the key turns out to lie outside, or shares its
//! bucket with others, further passes narrow the range down, sixteen bits at a time. Counts do not depend on the order in which they are
//! made, so neither does the answer. Of several equal magnitudes those with the lowest index are taken: exactly k elements, the
//! same ones everywhere.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};

use crate::bf16::{Element, Work};
use crate::simd::Level;
use crate::simd::dispatch::{self, MICRO, Sifted};
use crate::stream::{BLOCK, Control};
use crate::{Error, Result};

/// Elements of a sample; a shorter stream is looked at whole.
pub const SAMPLE: u64 = 1 << 16;
/// Elements that the sample takes from one place.
const RUN: u64 = 512;
/// Buckets of a histogram.
const BUCKETS: u64 = 1 << 16;
/// Slots of a worker's own table of counts.
const SLOTS: usize = 64;
/// How many standard errors the bracket reaches on either side.
const ERRORS: f64 = 5.0;
/// A bucket in which no key was seen, or more than one.
const EMPTY: u32 = 0;
const MIXED: u32 = u32::MAX;

/// The largest key of a work type.
pub fn top<W: Work>() -> u64 {
    if size_of::<W>() == 8 { u64::MAX >> 1 } else { u64::from(u32::MAX >> 1) }
}

/// A key as the magnitude that it stands for; keys above [`top`] are larger than every magnitude.
pub fn magnitude<W: Work>(key: u64) -> W::Magnitude {
    W::Magnitude::try_from(key.min(top::<W>() + 1)).unwrap_or_default()
}

/// Passes that a search can take at most: one with the bracket, then sixteen bits at a time.
pub fn passes(double: bool) -> usize {
    if double { 5 } else { 3 }
}

/// The places of a stream that its sample is taken from.
pub fn places(elements: u64) -> Vec<Range<u64>> {
    if elements <= SAMPLE {
        return std::iter::once(0..elements).collect();
    }
    let runs = SAMPLE / RUN;
    let at = |i: u64| (u128::from(elements - RUN) * u128::from(i) / u128::from(runs - 1)) as u64;
    (0..runs).map(|i| at(i)..at(i) + RUN).collect()
}

/// What a search ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Threshold {
    /// The key of the k-th largest magnitude.
    pub key: u64,
    /// Elements that have it.
    pub equal: u64,
    /// Those of them, the first by index, that are among the k.
    pub take: u64,
}

/// None are taken.
const NOTHING: Threshold = Threshold { key: u64::MAX, equal: 0, take: 0 };

/// The search for the k-th largest magnitude of a stream.
#[derive(Debug)]
pub struct Search {
    elements: u64,
    wanted: Wanted,
    pass: RwLock<Option<Arc<Pass>>>,
    guess: OnceLock<Guess>,
    found: OnceLock<Threshold>,
    last: OnceLock<Last>,
}

/// The block of the last equal that is taken, and which equal of that block it is, counted from one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Last {
    /// Which block.
    pub block: u64,
    /// Which of its equals.
    pub nth: u64,
}

/// What a sample lets one expect: the threshold, and the share of its equals that are taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guess {
    /// The key of the threshold.
    pub key: u64,
    /// How many of its equals are taken, of all of them.
    pub share: f64,
}

/// How many of the largest are wanted.
#[derive(Debug)]
enum Wanted {
    Count(u64),
    /// A share of those that are not zero, whose number is known after one pass.
    Share(f64, OnceLock<u64>),
}

/// One pass of a search.
#[derive(Debug)]
pub struct Pass {
    lo: u64,
    hi: u64,
    /// A key of the range that is likely to be the answer.
    likely: u64,
    shift: u32,
    above: AtomicU64,
    /// Zeros, where they are counted.
    none: AtomicU64,
    zeros: bool,
    /// What each block has of the lowest key of the range, of the highest, and of the likely one if it is another.
    marked: Box<[[AtomicU32; 3]]>,
    counts: Box<[AtomicU64]>,
    /// The one key of a bucket, from the bucket's start and plus one.
    only: Box<[AtomicU32]>,
}

/// A worker's own counts of one search, on their way to the shared ones.
#[derive(Debug, Clone)]
pub struct Tally {
    above: u64,
    highest: u64,
    lowest: u64,
    likely: u64,
    zeros: u64,
    slots: [(u64, u64); SLOTS],
    marks: [u8; MICRO],
}

impl Default for Tally {
    fn default() -> Self {
        Self { above: 0, highest: 0, lowest: 0, likely: 0, zeros: 0, slots: [(0, 0); SLOTS], marks: [0; MICRO] }
    }
}

impl Pass {
    fn new((lo, hi): (u64, u64), likely: u64, zeros: bool, elements: u64) -> Self {
        let span = hi - lo;
        let shift = (u64::BITS - span.leading_zeros()).saturating_sub(BUCKETS.trailing_zeros());
        let buckets = (span >> shift) as usize + 1;
        let counts = (0..buckets).map(|_| AtomicU64::new(0)).collect();
        let only = (0..buckets).map(|_| AtomicU32::new(EMPTY)).collect();
        let marked = (0..elements.div_ceil(BLOCK)).map(|_| Default::default()).collect();
        Self { lo, hi, likely, shift, above: AtomicU64::new(0), none: AtomicU64::new(0), zeros, marked, counts, only }
    }

    /// Counts at most MICRO elements.
    pub fn count<W: Work>(&self, level: Level, x: &[W], tally: &mut Tally) {
        let (lo, hi) = (magnitude::<W>(self.lo), magnitude::<W>(self.hi));
        let sifted = dispatch::sift(level, &mut tally.marks[..x.len()], x, lo, hi);
        if self.zeros {
            tally.zeros += dispatch::count_equal(level, x, W::Magnitude::default());
        }
        self.gather::<W>(x.len(), sifted, |i| x[i].magnitude(), tally);
    }

    /// Whether [`Pass::count_apart`] counts all that is to be counted.
    pub fn is_plain(&self) -> bool {
        !self.zeros
    }

    /// Counts the differences of at most MICRO elements; the largest magnitude of them.
    pub fn count_apart<E: Element, W: Work>(&self, level: Level, pair: [&[u8]; 2], tally: &mut Tally) -> W::Magnitude {
        // Nothing is between neighbours.
        let marks = if self.hi - self.lo > 1 { pair[0].len() / E::SIZE } else { 0 };
        let (lo, hi) = (magnitude::<W>(self.lo), magnitude::<W>(self.hi));
        let (sifted, largest) = dispatch::sift_apart::<E, W>(level, &mut tally.marks[..marks], pair, lo, hi);
        let element = |bytes: &[u8], i: usize| W::widen(E::load(&bytes[i * E::SIZE..(i + 1) * E::SIZE]));
        let key = |i: usize| (element(pair[0], i) - element(pair[1], i)).magnitude();
        self.gather::<W>(marks, sifted, key, tally);
        largest
    }

    /// Takes in what was sifted. The ends of the range are keys of the sample, which are likely to be those that many have, so they are counted
    /// on the way; what is between them is looked at one by one.
    fn gather<W: Work>(&self, marks: usize, sifted: Sifted, key: impl Fn(usize) -> W::Magnitude, tally: &mut Tally) {
        tally.above += sifted.above;
        tally.highest += sifted.highest;
        tally.lowest += sifted.lowest;
        let Tally { slots, likely, marks: all, .. } = tally;
        // What is left of an earlier call beyond them does not count.
        all[marks..marks.next_multiple_of(64)].fill(0);
        for (group, marks) in all[..marks.next_multiple_of(64)].as_chunks::<64>().0.iter().enumerate() {
            if marks.iter().fold(0, |any, mark| any | mark) == 0 {
                continue;
            }
            for (word, marks) in marks.as_chunks::<8>().0.iter().enumerate() {
                let mut left = u64::from_le_bytes(*marks);
                while left != 0 {
                    let key: u64 = key(group * 64 + word * 8 + left.trailing_zeros() as usize / 8).into();
                    left &= left - 1;
                    let slot = &mut slots[(key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 58) as usize];
                    if slot.0 != key {
                        self.spill(slot, likely);
                        slot.0 = key;
                    }
                    slot.1 += 1;
                }
            }
        }
    }

    /// Hands a worker's counts over, those of one block or of a part of it.
    pub fn close(&self, block: u64, tally: &mut Tally) {
        self.above.fetch_add(std::mem::take(&mut tally.above), Ordering::Relaxed);
        self.none.fetch_add(std::mem::take(&mut tally.zeros), Ordering::Relaxed);
        for slot in &mut tally.slots {
            self.spill(slot, &mut tally.likely);
        }
        let [lowest, highest, likely] = [&mut tally.lowest, &mut tally.highest, &mut tally.likely].map(std::mem::take);
        for (count, own) in self.marked[block as usize].iter().zip([lowest, highest, likely]) {
            count.fetch_add(own as u32, Ordering::Relaxed);
        }
        self.put(self.hi, highest);
        if self.lo < self.hi {
            self.put(self.lo, lowest);
        }
    }

    /// Empties a slot.
    fn spill(&self, slot: &mut (u64, u64), likely: &mut u64) {
        let (key, count) = std::mem::take(slot);
        if key == self.likely {
            *likely += count;
        }
        self.put(key, count);
    }

    /// Where the last of so many elements that have a key is, if blocks counted that key.
    fn last(&self, key: u64, wanted: u64) -> Option<Last> {
        let which = [self.lo, self.hi, self.likely].iter().position(|&marked| marked == key)?;
        let mut left = wanted;
        for (block, marked) in self.marked.iter().enumerate() {
            let own = u64::from(marked[which].load(Ordering::Relaxed));
            if left <= own {
                return Some(Last { block: block as u64, nth: left });
            }
            left -= own;
        }
        None
    }

    fn put(&self, key: u64, count: u64) {
        if count == 0 {
            return;
        }
        let bucket = ((key - self.lo) >> self.shift) as usize;
        self.counts[bucket].fetch_add(count, Ordering::Relaxed);
        if self.shift == 0 {
            return;
        }
        let within = (key - self.lo) & ((1 << self.shift) - 1);
        let mark = u32::try_from(within + 1).unwrap_or(MIXED);
        let only = &self.only[bucket];
        let seen = only.compare_exchange(EMPTY, mark, Ordering::Relaxed, Ordering::Relaxed);
        if seen.is_err_and(|before| before != mark) {
            only.store(MIXED, Ordering::Relaxed);
        }
    }
}

impl Search {
    /// The search for the `wanted`-th largest of so many elements.
    pub fn new(wanted: u64, elements: u64) -> Self {
        let found = OnceLock::new();
        let answer = match wanted {
            0 => Some(NOTHING),
            n if n >= elements => Some(Threshold { key: 0, equal: elements, take: elements }),
            _ => None,
        };
        if let Some(answer) = answer {
            let _ = found.set(answer);
        }
        Self::of(Wanted::Count(wanted), elements, found)
    }

    /// [`new`](Self::new) for whoever needs the key itself, also that of the smallest: to keep all, zero is as good.
    pub fn exact(wanted: u64, elements: u64) -> Self {
        Self::of(Wanted::Count(wanted), elements, OnceLock::new())
    }

    /// The search for the smallest of the largest `int(share * n)`, `n` being the number of magnitudes that are not zero.
    pub fn of_nonzero(share: f64, elements: u64) -> Self {
        let found = OnceLock::new();
        if elements == 0 {
            let _ = found.set(NOTHING);
        }
        Self::of(Wanted::Share(share, OnceLock::new()), elements, found)
    }

    fn of(wanted: Wanted, elements: u64, found: OnceLock<Threshold>) -> Self {
        Self { elements, wanted, pass: RwLock::new(None), guess: OnceLock::new(), found, last: OnceLock::new() }
    }

    /// What the sample lets one expect, if there is one and it is not all.
    pub fn guess(&self) -> Option<Guess> {
        self.guess.get().copied()
    }

    /// The answer, once there is one.
    pub fn found(&self) -> Option<Threshold> {
        self.found.get().copied()
    }

    /// Where its last equal is, if the pass that found the answer saw that.
    pub fn last(&self) -> Option<Last> {
        self.last.get().copied()
    }

    /// Whether a sample would help: not when there is an answer, or a pass has begun.
    pub fn wants_sample(&self) -> bool {
        self.found().is_none() && self.pass.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// The pass that is under way, unless there is an answer already.
    pub fn pass(&self) -> Option<Arc<Pass>> {
        if self.found().is_some() {
            return None;
        }
        self.pass.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins, with the values at [`places`]. Whoever comes second changes nothing.
    pub fn begin<W: Work>(&self, sample: &[W]) {
        if !self.wants_sample() {
            return;
        }
        let mut keys: Vec<W::Magnitude> = sample.iter().map(|x| x.magnitude()).collect();
        let nonzero = keys.iter().filter(|k| **k != W::Magnitude::default()).count() as f64;
        if self.elements <= SAMPLE {
            let wanted = match &self.wanted {
                Wanted::Count(n) => *n,
                Wanted::Share(share, _) => (share * nonzero) as u64,
            };
            if wanted == 0 {
                let _ = self.found.set(NOTHING);
                return;
            }
            let at = self.elements - wanted;
            let (below, key, above) = keys.select_nth_unstable(at as usize);
            let equal = |side: &[W::Magnitude]| side.iter().filter(|k| **k == *key).count() as u64;
            let larger = above.len() as u64 - equal(above);
            let answer =
                Threshold { key: (*key).into(), equal: equal(below) + 1 + equal(above), take: wanted - larger };
            let _ = self.found.set(answer);
            return;
        }
        let (rank, zeros) = match &self.wanted {
            Wanted::Count(n) => (*n as f64 / self.elements as f64 * keys.len() as f64, false),
            Wanted::Share(share, _) => (share * nonzero, true),
        };
        let (range, guess) = bracket::<W>(sample, &mut keys, rank);
        let _ = self.guess.set(guess);
        self.pass
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert_with(|| Arc::new(Pass::new(range, guess.key, zeros, self.elements)));
    }

    /// Takes part in another search's pass over the same stream, if it is the same: neighbouring ranks have one bracket.
    pub fn join(&self, other: &Self) {
        let Some(theirs) = other.pass() else { return };
        let mut own = self.pass.write().unwrap_or_else(PoisonError::into_inner);
        let same = |p: &Arc<Pass>| (p.lo, p.hi, p.zeros) == (theirs.lo, theirs.hi, theirs.zeros);
        if own.as_ref().is_some_and(same) {
            *own = Some(theirs);
        }
    }

    /// Ends a pass that has seen the whole stream: there is an answer now, or the next pass.
    pub fn end_pass<W: Work>(&self) {
        let Some(pass) = self.pass() else { return };
        let mut slot = self.pass.write().unwrap_or_else(PoisonError::into_inner);
        let above = pass.above.load(Ordering::Relaxed);
        let counts: Vec<u64> = pass.counts.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        let inside: u64 = counts.iter().sum();
        let wanted = match &self.wanted {
            Wanted::Count(n) => *n,
            Wanted::Share(share, n) => {
                let nonzero = self.elements - pass.none.load(Ordering::Relaxed);
                *n.get_or_init(|| (share * nonzero as f64) as u64)
            }
        };
        let mut range = None;
        if wanted == 0 {
            let _ = self.found.set(NOTHING);
        } else if wanted <= above {
            range = Some((pass.hi + 1, top::<W>()));
        } else if wanted > above + inside {
            if pass.lo == 1 {
                let equal = self.elements - above - inside;
                let _ = self.found.set(Threshold { key: 0, equal, take: wanted - above - inside });
            } else {
                range = Some((1, pass.lo - 1));
            }
        } else {
            let mut left = wanted - above;
            for (bucket, &count) in counts.iter().enumerate().rev() {
                if left > count {
                    left -= count;
                    continue;
                }
                let start = pass.lo + ((bucket as u64) << pass.shift);
                let only = pass.only[bucket].load(Ordering::Relaxed);
                if pass.shift == 0 {
                    let _ = self.found.set(Threshold { key: start, equal: count, take: left });
                } else if only != MIXED {
                    let _ = self.found.set(Threshold { key: start + u64::from(only) - 1, equal: count, take: left });
                } else {
                    range = Some((start, (start + (1 << pass.shift) - 1).min(pass.hi)));
                }
                break;
            }
        }
        if let Some(last) = self.found().and_then(|found| pass.last(found.key, found.take)) {
            let _ = self.last.set(last);
        }
        *slot = range.map(|range| Arc::new(Pass::new(range, range.0, false, self.elements)));
    }

    /// The most bytes that a search of so many elements holds.
    pub fn memory(elements: u64) -> u64 {
        BUCKETS * 12 + elements.div_ceil(BLOCK) * 12
    }
}

/// A range of keys that all but surely holds the answer, and what it is expected to be. Neighbours are alike, so the places of the sample say how far off it can be, and not the
/// number of its elements.
fn bracket<W: Work>(sample: &[W], keys: &mut [W::Magnitude], rank: f64) -> ((u64, u64), Guess) {
    let n = keys.len() as f64;
    // Of keys in two parts around the one at a rank, those in the part that it is in need sorting out.
    let place = |from_top: f64| (n - 1.0 - from_top).clamp(0.0, n - 1.0) as usize;
    let at = place(rank);
    let middle = *keys.select_nth_unstable(at).1;
    let shares = sample.chunks(RUN as usize).map(|run| {
        let above = run.iter().filter(|x| x.magnitude() > middle).count();
        let reached = run.iter().filter(|x| x.magnitude() >= middle).count();
        (above + reached) as f64 / (2 * run.len()) as f64
    });
    let shares: Vec<f64> = shares.collect();
    let runs = shares.len() as f64;
    let mean = shares.iter().sum::<f64>() / runs;
    let spread = shares.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / (runs - 1.0).max(1.0);
    let margin = ERRORS * (spread / runs).sqrt() * n + 16.0;
    let hi =
        if rank < margin { top::<W>() } else { (*keys[at..].select_nth_unstable(place(rank - margin) - at).1).into() };
    let lo =
        if rank + margin > n - 1.0 { 0 } else { (*keys[..=at].select_nth_unstable(place(rank + margin)).1).into() };
    // Zeros can be most of a stream: what is below a bracket from 1 on needs no counting.
    let lo = lo.max(1);
    let above = keys.iter().filter(|k| **k > middle).count() as f64;
    let equal = keys.iter().filter(|k| **k == middle).count() as f64;
    let guess = Guess { key: middle.into(), share: ((rank - above) / equal).clamp(0.0, 1.0) };
    ((lo, hi.max(lo)), guess)
}

/// Where the elements that are equal to a threshold stop being taken, for some searches over one tensor. What a block needs to know
/// is how many equals come before it: its worker counts its own and waits for those of the blocks before.
#[derive(Debug)]
pub struct Order {
    state: Mutex<Counted>,
    moved: Condvar,
    cuts: Vec<OnceLock<u64>>,
    broken: AtomicBool,
}

#[derive(Debug)]
struct Counted {
    next: u64,
    before: Vec<u64>,
}

impl Order {
    /// For so many searches.
    pub fn new(searches: usize) -> Self {
        Self {
            state: Mutex::new(Counted { next: 0, before: vec![0; searches] }),
            moved: Condvar::new(),
            cuts: (0..searches).map(|_| OnceLock::new()).collect(),
            broken: AtomicBool::new(false),
        }
    }

    /// The index from which on equals of a search are not taken, if it is known.
    pub fn cut(&self, search: usize) -> Option<u64> {
        self.cuts[search].get().copied()
    }

    /// Says it.
    pub fn set_cut(&self, search: usize, at: u64) {
        let _ = self.cuts[search].set(at);
    }

    /// Waits for the blocks before `block`, tells what it has itself (one count a search), and gives what came before. `None` if every cut of the searches
    /// that are `open` became known meanwhile.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when an earlier block will not come.
    pub fn pass(&self, block: u64, open: &[usize], own: &[u64], control: &Control) -> Result<Option<Vec<u64>>> {
        let known = || open.iter().all(|&search| self.cut(search).is_some());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.next != block {
            if known() {
                return Ok(None);
            }
            if self.broken.load(Ordering::Relaxed) || control.cancelled() {
                return Err(Error::Cancelled);
            }
            let wait = std::time::Duration::from_millis(50);
            state = self.moved.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let before = state.before.clone();
        state.before.iter_mut().zip(own).for_each(|(sum, n)| *sum += n);
        state.next += 1;
        drop(state);
        self.moved.notify_all();
        Ok(Some(before))
    }

    /// Wakes everyone who waits: a block that they wait for will not come.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
        drop(self.state.lock());
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The answer by sorting.
    fn sorted<W: Work>(values: &[W], wanted: u64) -> Threshold {
        let mut keys: Vec<u64> = values.iter().map(|x| x.magnitude().into()).collect();
        keys.sort_unstable_by(|a, b| b.cmp(a));
        let key = keys[wanted as usize - 1];
        let equal = keys.iter().filter(|&&k| k == key).count() as u64;
        let above = keys.iter().filter(|&&k| k > key).count() as u64;
        Threshold { key, equal, take: wanted - above }
    }

    fn searched<W: Work>(values: &[W], wanted: u64, level: Level) -> (Threshold, usize) {
        let search = Search::new(wanted, values.len() as u64);
        let places = places(values.len() as u64);
        let sample: Vec<W> = places.iter().flat_map(|p| values[p.start as usize..p.end as usize].to_vec()).collect();
        search.begin(&sample);
        finish(&search, values, level)
    }

    fn finish<W: Work>(search: &Search, values: &[W], level: Level) -> (Threshold, usize) {
        let mut passes = 0;
        while let Some(pass) = search.pass() {
            // Two workers, so that the counts of both are joined.
            let mut tallies = [Tally::default(), Tally::default()];
            for (block, values) in values.chunks(BLOCK as usize).enumerate() {
                for (i, x) in values.chunks(MICRO).enumerate() {
                    pass.count(level, x, &mut tallies[i % 2]);
                }
                tallies.iter_mut().for_each(|t| pass.close(block as u64, t));
            }
            search.end_pass::<W>();
            passes += 1;
        }
        let found = search.found().unwrap();
        if let Some(last) = search.last() {
            let equal = |x: &W| u64::from(x.magnitude().into() == found.key);
            let mut before = values.chunks(BLOCK as usize).map(|block| block.iter().map(equal).sum::<u64>());
            let earlier: u64 = before.by_ref().take(last.block as usize).sum();
            assert_eq!(earlier + last.nth, found.take);
            assert!((1..=before.next().unwrap()).contains(&last.nth));
        }
        (found, passes)
    }

    fn stream(kind: u8, n: usize, seed: u64) -> Vec<f64> {
        let normal = crate::philox::Philox::new(seed, "select", 3);
        let mut values: Vec<f64> = (0..n as u64).map(|i| normal.normal_pair(i)[0]).collect();
        for (i, v) in values.iter_mut().enumerate() {
            match kind {
                // Steps, as the differences of 16-bit formats are.
                1 => *v = (*v * 20.0).round() / 20.0,
                // Mostly zeros of both signs.
                2 if i % 10 != 0 => *v *= 0.0,
                // What the sample sees is not what there is.
                3 if (i / 1000) % 7 == 0 => *v *= 1e6,
                4 => *v = 0.25,
                5 if i % 3 == 0 => *v *= 1e-300,
                _ => {}
            }
        }
        values
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_answer_is_what_sorting_finds(kind in 0u8..6, n in 1usize..400_000, share in 0.0f64..1.0, seed in 0u64..1 << 40) {
            let values = stream(kind, n, seed);
            let single: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            let wanted = ((share * n as f64) as u64).max(1).min(n as u64 - 1);
            prop_assume!(wanted >= 1);
            for level in Level::available() {
                let (found, took) = searched(&single, wanted, level);
                prop_assert_eq!(found, sorted(&single, wanted));
                prop_assert!(took <= passes(false));
            }
            let (found, took) = searched(&values, wanted, Level::portable());
            prop_assert_eq!(found, sorted(&values, wanted));
            prop_assert!(took <= passes(true));
        }
    }

    #[test]
    fn one_pass_is_enough_for_the_differences_of_16_bit_formats() {
        let values: Vec<f32> = stream(0, 400_000, 5)
            .iter()
            .map(|&x| {
                let base = (x * 0.02) as f32;
                let moved = (x * 0.0201) as f32;
                f32::from_bits(moved.to_bits() & 0xFFFF_0000) - f32::from_bits(base.to_bits() & 0xFFFF_0000)
            })
            .collect();
        for wanted in [4_000, 80_000, 200_000] {
            assert!(searched(&values, wanted, Level::portable()).1 <= 1, "{wanted}");
        }
    }

    #[test]
    fn a_share_of_what_is_not_zero() {
        for n in [5_000, 150_000] {
            let values: Vec<f32> = stream(2, n, 9).iter().map(|&x| x as f32).collect();
            let nonzero = values.iter().filter(|&&x| x != 0.0).count() as f64;
            for share in [0.0, 0.1, 0.5, 0.999] {
                let search = Search::of_nonzero(share, n as u64);
                let sample: Vec<f32> =
                    places(n as u64).iter().flat_map(|p| values[p.start as usize..p.end as usize].to_vec()).collect();
                search.begin(&sample);
                let wanted = (share * nonzero) as u64;
                let expected = if wanted == 0 { NOTHING } else { sorted(&values, wanted) };
                assert_eq!(finish(&search, &values, Level::portable()).0, expected, "{share} of {n}");
            }
        }
    }

    #[test]
    fn nothing_and_everything_need_no_look() {
        assert_eq!(Search::new(0, 9).found().map(|t| t.take), Some(0));
        assert_eq!(Search::new(9, 9).found().map(|t| (t.key, t.take)), Some((0, 9)));
        assert_eq!(Search::new(3, 0).found().map(|t| t.take), Some(0));
    }
}
