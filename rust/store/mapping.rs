//! Mappings of files that the page cache holds in huge pages: what is computed on them does not wait for a copy, and one entry of the page
//! tables stands for 2 MiB. In small pages a mapping costs as much as a copy, or more, so there files are read.
//!
//! A mapping is touched only where it was populated before, because touching a page that a truncated file no longer has, or that the
//! disk cannot read, is a signal that kills the process. What cannot be populated is read, which is an `errno`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use memmap2::{Advice, Mmap, UncheckedAdvice};
use rustix::io::{ReadWriteFlags, preadv2};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// What one entry of the page tables can stand for.
const CHUNK: usize = 2 << 20;
/// What is given back at a time, one of them behind the windows: giving back interrupts every thread.
const SPAN: usize = 4 * CHUNK;

/// What is known of a chunk: nothing; that it is mapped; that it is to be read.
const UNKNOWN: u8 = 0;
const MAPPED: u8 = 1;
const READ: u8 = 2;

/// The most chunks behind one of small pages that are read without a look at them.
const DOUBT: usize = 32;

/// A mapping, and what is known of its chunks.
#[derive(Debug)]
pub(super) struct Mapping {
    map: Mmap,
    chunks: Vec<AtomicU8>,
    /// Chunks that are read behind the next one of small pages: the more, the more of them came one after the other.
    doubt: AtomicUsize,
    /// Whether pages of any size are mapped.
    any: bool,
}

impl Mapping {
    /// The mapping of a file of a length: of pages of any size where `REASONVEC_IO=map` asks for it; none if that says `read`.
    pub(super) fn of(file: &File, len: u64) -> Option<Self> {
        match std::env::var_os("REASONVEC_IO") {
            Some(how) if how == "map" => Self::new(file, len, true),
            Some(how) if how == "read" => None,
            _ => Self::new(file, len, false),
        }
    }

    /// The mapping, unless the system does not know how to populate one, or to tell what pages it is of.
    fn new(file: &File, len: u64, any: bool) -> Option<Self> {
        let len = usize::try_from(len).ok()?;
        if len == 0 || !any && (len < CHUNK || pagemap().is_none()) {
            return None;
        }
        // Of the length that was seen before, or another process is changing the file.
        // SAFETY: the mapping is private to this type, read only where it was populated, and every value in it is treated as untrusted
        // bytes, so a file that changes underneath can give wrong numbers (which the digests show) but no invalid value.
        let map = unsafe { Mmap::map(file) }.ok().filter(|map| map.len() == len)?;
        if any {
            map.advise_range(Advice::PopulateRead, 0, 1).ok()?;
        }
        let chunks = (0..len.div_ceil(CHUNK)).map(|_| AtomicU8::new(UNKNOWN)).collect();
        Some(Self { map, chunks, doubt: AtomicUsize::new(0), any })
    }

    /// Whether pages of any size are mapped.
    pub(super) fn is_forced(&self) -> bool {
        self.any
    }

    /// Some bytes, populated; `None` where they are to be read.
    pub(super) fn window(&self, file: &File, range: &Range<u64>) -> Option<&[u8]> {
        let bytes = range.start as usize..range.end as usize;
        if !(bytes.start / CHUNK..bytes.end.div_ceil(CHUNK)).all(|chunk| self.has(file, chunk)) {
            return None;
        }
        // What was there a moment ago may have been cut off.
        let still = file.metadata().is_ok_and(|now| now.len() >= range.end);
        still.then(|| &self.map[bytes])
    }

    fn has(&self, file: &File, chunk: usize) -> bool {
        let from = chunk * CHUNK;
        match self.chunks[chunk].load(Ordering::Relaxed) {
            MAPPED => return true,
            READ => return false,
            _ if !self.any && !is_cached(file, from as u64) => return false,
            _ => {}
        }
        let bytes = from..self.map.len().min(from + CHUNK);
        // One page brings in the entry that stands for all of them. Where there is none, to populate them all costs more than to read them.
        let probe = if self.any { bytes.len() } else { 1 };
        if self.map.advise_range(Advice::PopulateRead, from, probe).is_err() {
            return false;
        }
        let take = self.any || is_huge(&self.map[bytes.clone()]);
        self.note(chunk, take);
        if !take {
            self.give_back(bytes);
        }
        take
    }

    /// A chunk is mapped, or of small pages: then it is read, and so are some of those behind it.
    fn note(&self, chunk: usize, huge: bool) {
        self.chunks[chunk].store(if huge { MAPPED } else { READ }, Ordering::Relaxed);
        let doubt = self.doubt.load(Ordering::Relaxed);
        self.doubt.store(if huge { 0 } else { (2 * doubt).clamp(1, DOUBT) }, Ordering::Relaxed);
        let doubtful = if huge { 0 } else { doubt };
        for state in self.chunks[chunk + 1..].iter().take(doubtful) {
            let _ = state.compare_exchange(UNKNOWN, READ, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Gives back what lies behind a window that is done with.
    pub(super) fn release(&self, window: Range<usize>) {
        let behind = |at: usize| (at / SPAN).saturating_sub(1) * SPAN;
        let (first, last) = (behind(window.start), behind(window.end));
        if first < last {
            for state in &self.chunks[first / CHUNK..last / CHUNK] {
                let _ = state.compare_exchange(MAPPED, UNKNOWN, Ordering::Relaxed, Ordering::Relaxed);
            }
            self.give_back(first..last);
        }
    }

    /// Takes pages out of the tables. What somebody still reads there comes in again as he touches it.
    fn give_back(&self, bytes: Range<usize>) {
        // SAFETY: the mapping is read-only and backed by a file, so dropping clean pages loses nothing: the next touch reads them again.
        let _ = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
    }
}

/// Whether the page cache has the page of an offset. What it has not is read: ahead of time, and into buffers.
fn is_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT) == Ok(1)
}

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The kernel's `struct page_region`.
#[repr(C)]
#[derive(Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: Opcode = opcode::read_write::<Scan>(b'f', 16);
const PAGE_IS_HUGE: u64 = 1 << 6;

fn pagemap() -> Option<&'static File> {
    static PAGEMAP: OnceLock<Option<File>> = OnceLock::new();
    PAGEMAP.get_or_init(|| File::open("/proc/self/pagemap").ok()).as_ref()
}

/// Whether all of some memory is mapped by huge pages, as far as the system tells (Linux 6.7 and later).
fn is_huge(memory: &[u8]) -> bool {
    let Some(pagemap) = pagemap() else { return false };
    let Range { start, end } = memory.as_ptr_range();
    let (start, end) = (start.addr() as u64, end.addr() as u64);
    let mut found = Region::default();
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start,
        end,
        regions: std::ptr::from_mut(&mut found).expose_provenance() as u64,
        regions_len: 1,
        category_mask: PAGE_IS_HUGE,
        return_mask: PAGE_IS_HUGE,
        ..Scan::default()
    };
    // SAFETY: the opcode and the structure are of the same call, and the one region that it may write to is there until it returns.
    let asked = unsafe { ioctl(pagemap, Updater::<PAGEMAP_SCAN, Scan>::new(&mut scan)) };
    asked.is_ok() && (found.start, found.end) == (start, end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LEN: usize = 3 * SPAN + CHUNK + 12_345;

    fn file() -> (File, Vec<u8>) {
        let content: Vec<u8> = (0..LEN / 4 + 1).flat_map(|i| (i as u32).to_le_bytes()).take(LEN).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        (file, content)
    }

    /// Windows one after the other, those of the second half twice, as a tensor is that is read in two stages.
    fn windows() -> impl Iterator<Item = Range<usize>> {
        const STEP: usize = 300_001;
        let half = LEN / 2;
        let all = |from: usize| (from..LEN).step_by(STEP).map(|at| at..LEN.min(at + STEP));
        all(0).chain(all(half)).chain([0..LEN, LEN - 1..LEN, 5..5])
    }

    #[test]
    fn what_is_mapped_is_what_the_file_has() {
        let (file, content) = file();
        for any in [true, false] {
            let Some(mapping) = Mapping::new(&file, LEN as u64, any) else { continue };
            for range in windows() {
                let window = mapping.window(&file, &(range.start as u64..range.end as u64));
                assert!(!any || window.is_some());
                assert!(window.is_none_or(|bytes| bytes == &content[range.clone()]));
                mapping.release(range);
            }
        }
    }

    #[test]
    fn what_lies_behind_is_given_back() {
        let (file, _) = file();
        let Some(mapping) = Mapping::new(&file, LEN as u64, true) else { return };
        for range in windows().take_while(|range| range.start < LEN - SPAN) {
            mapping.window(&file, &(range.start as u64..range.end as u64)).unwrap();
            mapping.release(range.clone());
            let held = mapping.chunks.iter().filter(|state| state.load(Ordering::Relaxed) == MAPPED).count();
            assert!(held <= 2 * SPAN / CHUNK + 1, "{held} at {range:?}");
        }
    }

    #[test]
    fn small_pages_are_looked_at_less_and_less() {
        let (file, _) = file();
        let Some(mapping) = Mapping::new(&file, LEN as u64, false) else { return };
        let states = || mapping.chunks.iter().map(|state| state.load(Ordering::Relaxed)).collect::<Vec<_>>();
        mapping.note(0, true);
        mapping.note(1, false);
        mapping.note(2, false);
        mapping.note(4, false);
        mapping.note(7, true);
        mapping.note(8, false);
        let (m, r, u) = (MAPPED, READ, UNKNOWN);
        assert_eq!(states()[..10], [m, r, r, r, r, r, r, m, r, u]);
    }

    #[test]
    fn what_was_cut_off_is_not_touched() {
        let (file, content) = file();
        for any in [true, false] {
            let Some(mapping) = Mapping::new(&file, LEN as u64, any) else { continue };
            let _ = mapping.window(&file, &(0..LEN as u64));
            file.set_len(CHUNK as u64).unwrap();
            for from in [0, CHUNK - 1, CHUNK, SPAN] {
                assert!(mapping.window(&file, &(from as u64..LEN as u64)).is_none());
            }
            let start = mapping.window(&file, &(0..CHUNK as u64));
            assert!(start.is_none_or(|bytes| bytes == &content[..CHUNK]));
            file.set_len(LEN as u64).unwrap();
        }
    }
}
