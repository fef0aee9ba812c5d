//! Read-only windows over a file.
//!
//! A window is a slice of a [mapping](super::mapping) where the page cache holds the file in huge pages (Linux 6.7 and later, on a file
//! system that makes them), and elsewhere a positioned read into a buffer of the worker's [`Pool`]: the buffer stays in the second-level
//! cache, so that what is computed on it does not wait for memory, and no page tables change hands. `REASONVEC_IO=map` maps pages of any
//! size, which takes half as long again where they are small; `REASONVEC_IO=read` maps nothing.

use std::cell::RefCell;
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicU64, Ordering};

use super::buffer::Buffer;
#[cfg(target_os = "linux")]
use super::mapping::Mapping;
use crate::{Error, Result};

/// A file opened for reading, and perhaps mapped.
#[derive(Debug)]
pub struct FileMap {
    path: PathBuf,
    file: File,
    len: u64,
    #[cfg(target_os = "linux")]
    mapping: Option<Mapping>,
    /// Bytes that are worth asking for ahead of reading them, because a read before them had to wait for the disk.
    #[cfg(target_os = "linux")]
    ask: AtomicU64,
}

/// Buffers that windows borrow where there is no mapping; one pool a worker. Two windows over the same bytes share one: a base that several
/// differences take from is read once.
#[derive(Debug, Default)]
pub struct Pool {
    free: RefCell<Vec<Buffer>>,
    open: RefCell<Vec<(Place, Arc<Buffer>)>>,
}

/// A file, by where its [`FileMap`] is as long as windows borrow it, and a range of it.
type Place = (usize, Range<u64>);

/// What a read that had to wait for the disk makes worth asking for.
#[cfg(target_os = "linux")]
const ASK: u64 = 64 << 20;

/// Some bytes of a file, valid until dropped.
#[derive(Debug)]
pub struct Window<'a>(Held<'a>);

#[derive(Debug)]
enum Held<'a> {
    #[cfg(target_os = "linux")]
    Mapped {
        bytes: &'a [u8],
        mapping: &'a Mapping,
        start: usize,
    },
    Read {
        bytes: Arc<Buffer>,
        pool: &'a Pool,
    },
}

impl FileMap {
    /// Opens a regular file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Format`] if it is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        // Before it is opened: to open a named pipe is to wait for whoever writes into it.
        if !std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?.is_file() {
            return Err(Error::format(path, "expected a regular file"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, "inspect", e))?;
        let len = meta.len();
        #[cfg(target_os = "linux")]
        let mapping = Mapping::of(&file, len);
        Ok(Self {
            path: path.to_path_buf(),
            file,
            len,
            #[cfg(target_os = "linux")]
            mapping,
            #[cfg(target_os = "linux")]
            ask: AtomicU64::new(0),
        })
    }

    /// The file's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length when it was opened, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it had no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The open file, for `copy_file_range`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether windows may take memory of the pool.
    pub fn windows_are_read(&self) -> bool {
        #[cfg(target_os = "linux")]
        {
            !self.mapping.as_ref().is_some_and(Mapping::is_forced)
        }
        #[cfg(not(target_os = "linux"))]
        {
            true
        }
    }

    /// Fills a buffer from an offset.
    ///
    /// # Errors
    /// [`Error::Io`] for a read error or a file that became shorter.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        #[cfg(target_os = "linux")]
        let (into, offset) = {
            let present = self.read_present(into, offset);
            (&mut into[present..], offset + present as u64)
        };
        read_exact_at(&self.file, into, offset).map_err(|e| self.explain(e))
    }

    /// Reads as much as the page cache has, without waiting.
    #[cfg(target_os = "linux")]
    fn read_present(&self, into: &mut [u8], offset: u64) -> usize {
        let parts = &mut [std::io::IoSliceMut::new(into)];
        // A file system that does not know the flag is taken for a slow one.
        let present = rustix::io::preadv2(&self.file, parts, offset, rustix::io::ReadWriteFlags::NOWAIT).unwrap_or(0);
        if present < into.len() {
            self.ask.store(ASK, Ordering::Relaxed);
        }
        present
    }

    fn explain(&self, e: std::io::Error) -> Error {
        if e.kind() == std::io::ErrorKind::UnexpectedEof {
            let now = self.file.metadata().map_or(0, |m| m.len());
            let found = format!(
                "the file was {} bytes when it was opened and is {now} now: another process is changing it; run again when it is whole",
                self.len
            );
            return Error::io(&self.path, "read", std::io::Error::new(e.kind(), found));
        }
        Error::io(&self.path, "read", e)
    }

    /// A window over some bytes, present in memory.
    ///
    /// # Errors
    /// [`Error::Io`] if the bytes cannot be read, or are no longer there.
    pub fn window<'a>(&'a self, range: Range<u64>, pool: &'a Pool) -> Result<Window<'a>> {
        debug_assert!(range.start <= range.end && range.end <= self.len);
        #[cfg(target_os = "linux")]
        if let Some(mapping) = &self.mapping
            && range.start < range.end
            && let Some(bytes) = mapping.window(&self.file, &range)
        {
            return Ok(Window(Held::Mapped { bytes, mapping, start: range.start as usize }));
        }
        let len = (range.end - range.start) as usize;
        let place = (std::ptr::from_ref(self).addr(), range);
        let bytes = match pool.shared(&place) {
            Some(bytes) => bytes,
            None => {
                let mut bytes = pool.free.borrow_mut().pop().unwrap_or_default();
                self.read_at(bytes.fit(len, place.1.start), place.1.start)?;
                pool.share(place, bytes)
            }
        };
        Ok(Window(Held::Read { bytes, pool }))
    }

    /// Asks the system to start reading some bytes, without waiting; but not where the page cache has had everything of late, because
    /// asking costs a fifth of reading.
    pub fn prefetch(&self, range: Range<u64>) {
        #[cfg(target_os = "linux")]
        if range.start < range.end && range.end <= self.len {
            let length = range.end - range.start;
            let asked = self
                .ask
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n > 0).then(|| n.saturating_sub(length)));
            if asked.is_err() {
                return;
            }
            let length = std::num::NonZeroU64::new(length);
            // Only a hint: what it could not start is read when the window is opened.
            let _ = rustix::fs::fadvise(&self.file, range.start, length, rustix::fs::Advice::WillNeed);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, into: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut into: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !into.is_empty() {
        match file.seek_read(into, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                into = &mut into[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

impl Pool {
    /// The bytes of an open window.
    fn shared(&self, place: &Place) -> Option<Arc<Buffer>> {
        self.open.borrow().iter().find(|(open, _)| open == place).map(|(_, bytes)| bytes.clone())
    }

    fn share(&self, place: Place, bytes: Buffer) -> Arc<Buffer> {
        let bytes = Arc::new(bytes);
        self.open.borrow_mut().push((place, bytes.clone()));
        bytes
    }

    /// Takes back the bytes of a window, once no other one is over them.
    fn give(&self, bytes: &mut Arc<Buffer>) {
        if Arc::strong_count(bytes) > 2 {
            return;
        }
        self.open.borrow_mut().retain(|(_, open)| !Arc::ptr_eq(open, bytes));
        if let Some(bytes) = Arc::get_mut(bytes) {
            self.free.borrow_mut().push(std::mem::take(bytes));
        }
    }
}

impl Deref for Window<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            #[cfg(target_os = "linux")]
            Held::Mapped { bytes, .. } => bytes,
            Held::Read { bytes, .. } => bytes,
        }
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        match &mut self.0 {
            #[cfg(target_os = "linux")]
            Held::Mapped { bytes, mapping, start } => mapping.release(*start..*start + bytes.len()),
            Held::Read { bytes, pool, .. } => pool.give(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn windows_over_the_same_bytes_are_one() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7u8; 4096]).unwrap();
        let map = FileMap::open(file.path()).unwrap();
        let pool = Pool::default();
        let (a, b) = (map.window(0..64, &pool).unwrap(), map.window(0..64, &pool).unwrap());
        let other = map.window(0..65, &pool).unwrap();
        assert_eq!(a.as_ptr(), b.as_ptr());
        assert_ne!(a.as_ptr(), other.as_ptr());
        drop(a);
        assert!(b.iter().all(|&b| b == 7));
        drop((b, other));
        assert!(pool.open.borrow().is_empty());
        assert_eq!(pool.free.borrow().len(), 2);
    }

    #[test]
    fn a_truncated_file_is_an_error_and_not_a_signal() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![7u8; 1 << 20]).unwrap();
        let map = FileMap::open(file.path()).unwrap();
        let pool = Pool::default();
        assert!(map.window(0..1 << 20, &pool).unwrap().iter().all(|&b| b == 7));
        file.as_file().set_len(4096).unwrap();
        let error = map.window(1 << 19..1 << 20, &pool).unwrap_err().to_string();
        assert!(error.contains("was 1048576 bytes when it was opened and is 4096 now"), "{error}");
    }
}
