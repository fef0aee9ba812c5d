//! Files that are laid out before their first byte, and that bear their final name only when they are whole.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use super::map::FileMap;
use crate::{Error, Result};

/// What is added to a name while its file is not whole.
pub const PARTIAL: &str = ".partial";

/// A file of known length that is being filled in.
#[derive(Debug)]
pub struct Writer {
    file: File,
    partial: PathBuf,
    path: PathBuf,
}

/// What a file is called until it is whole.
pub fn partial_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(PARTIAL);
    path.with_file_name(name)
}

impl Writer {
    /// Lays out `<path>.partial` with a length; what an earlier run left there is kept.
    ///
    /// # Errors
    /// [`Error::Io`]; a disk without room fails here, before anything is computed.
    pub fn create(path: &Path, len: u64) -> Result<Self> {
        let writer = Self::open(path, false)?;
        allocate(&writer.file, len).map_err(|e| Error::io(&writer.partial, "allocate room for", e))?;
        Ok(writer)
    }

    /// Opens `<path>.partial`, to be appended to by offsets; emptied when `fresh`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path, fresh: bool) -> Result<Self> {
        let partial = partial_of(path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(fresh)
            .open(&partial)
            .map_err(|e| Error::io(&partial, "create", e))?;
        Ok(Self { file, partial, path: path.to_path_buf() })
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path until it is whole.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Writes bytes at an offset.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        write_all_at(&self.file, bytes, offset).map_err(|e| Error::io(&self.partial, "write", e))
    }

    /// Reads bytes back.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> Result<()> {
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_exact_at(&self.file, into, offset);
        #[cfg(windows)]
        let read = {
            use std::io::{Read, Seek};
            let mut file = &self.file;
            file.seek(std::io::SeekFrom::Start(offset)).and_then(|_| file.read_exact(into))
        };
        read.map_err(|e| Error::io(&self.partial, "read", e))
    }

    /// Copies bytes of another file, inside the kernel where it can.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy_from(&self, source: &FileMap, from: u64, to: u64, len: u64) -> Result<()> {
        let mut done = 0;
        #[cfg(target_os = "linux")]
        while done < len {
            let (mut at, mut into) = (from + done, to + done);
            match rustix::fs::copy_file_range(
                source.file(),
                Some(&mut at),
                &self.file,
                Some(&mut into),
                (len - done) as usize,
            ) {
                Ok(0)
                | Err(
                    rustix::io::Errno::XDEV
                    | rustix::io::Errno::INVAL
                    | rustix::io::Errno::NOSYS
                    | rustix::io::Errno::OPNOTSUPP,
                ) => break,
                Ok(n) => done += n as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io(&self.partial, "write", e.into())),
            }
        }
        let mut buffer = vec![0u8; (len - done).min(1 << 18) as usize];
        while done < len {
            let n = (len - done).min(1 << 18) as usize;
            source.read_at(&mut buffer[..n], from + done)?;
            self.write_at(&buffer[..n], to + done)?;
            done += n as u64;
        }
        Ok(())
    }

    /// Cuts the file off at a length.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(|e| Error::io(&self.partial, "set the length of", e))
    }

    /// Syncs (if asked) and gives the file its final name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self, sync: bool) -> Result<()> {
        self.finish_as(sync, None)
    }

    /// [`Writer::finish`] under another name in the same folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish_as(self, sync: bool, name: Option<&str>) -> Result<()> {
        if sync {
            self.file.sync_all().map_err(|e| Error::io(&self.partial, "sync", e))?;
        }
        drop(self.file);
        let path = name.map_or(self.path.clone(), |n| self.path.with_file_name(n));
        std::fs::rename(&self.partial, &path).map_err(|e| Error::io(&path, "rename the finished file to", e))?;
        if sync { sync_folder(&path) } else { Ok(()) }
    }
}

/// Takes a finished file's name away again, because something in it has to be written anew.
///
/// # Errors
/// [`Error::Io`].
pub fn take_back(path: &Path) -> Result<()> {
    std::fs::rename(path, partial_of(path)).map_err(|e| Error::io(path, "rename", e))
}

/// Writes a small file whole, or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write_whole(path: &Path, bytes: &[u8], sync: bool) -> Result<()> {
    let writer = Writer::open(path, true)?;
    writer.write_at(bytes, 0)?;
    writer.finish(sync)
}

/// Copies a file whole, or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn copy_whole(from: &Path, to: &Path, sync: bool) -> Result<()> {
    let source = FileMap::open(from)?;
    let writer = Writer::open(to, true)?;
    writer.copy_from(&source, 0, 0, source.len())?;
    writer.finish(sync)
}

fn sync_folder(path: &Path) -> Result<()> {
    #[cfg(unix)]
    if let Some(folder) = path.parent() {
        File::open(folder).and_then(|f| f.sync_all()).map_err(|e| Error::io(folder, "sync", e))?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

fn allocate(file: &File, len: u64) -> std::io::Result<()> {
    file.set_len(len)?;
    #[cfg(target_os = "linux")]
    if len > 0 {
        use rustix::io::Errno;
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len) {
            // A file system that cannot reserve room says so when it runs out.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(e) => {
                // An out-of-room file must not keep the room it did get.
                let _ = file.set_len(0);
                return Err(e.into());
            }
        }
    }
    Ok(())
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset)? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            n => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}
