//! The roofline: what the same reading and writing costs when nothing is computed.
//!
//! It maps the inputs that `reasonvec apply --from` (or `extract`) reads, brings every cache line of
//! them in, window by window, and writes the same number of bytes to preallocated files: no arithmetic,
//! no digests, no checks. What reasonvec takes longer than this is the price of its work.
//! It shares no code with the library, so that a mistake there cannot move the line it is held to.
//!
//! ```text
//! roofline apply POSITIVE NEGATIVE TARGET OUT [--threads N] [--sync]
//! roofline extract POSITIVE NEGATIVE OUT --bytes B [--threads N] [--sync]
//! ```
#![allow(clippy::print_stdout, reason = "what it prints is its result")]

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::hint::black_box;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use memmap2::Mmap;
use serde_json::{Map, Value, json};

const WINDOW: usize = 2 << 20;
const CACHE_LINE: usize = 64;
const USAGE: &str = "roofline apply P N T OUT | extract P N OUT --bytes B  [--threads N] [--sync]";

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let (mut folders, mut threads, mut bytes, mut sync) = (Vec::new(), 2, 0, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--threads" => threads = arguments.next().ok_or(USAGE)?.parse()?,
            "--bytes" => bytes = arguments.next().ok_or(USAGE)?.parse()?,
            "--sync" => sync = true,
            "--bench" => {} // `cargo bench` passes it to every bench target.
            _ => folders.push(PathBuf::from(argument)),
        }
    }
    let Some((command, folders)) = folders.split_first() else {
        println!("usage: {USAGE}");
        return Ok(());
    };
    let start = Instant::now();
    let (inputs, out) = folders.split_at(folders.len().saturating_sub(1));
    let out = out.first().ok_or(USAGE)?;
    let inputs = inputs.iter().map(|folder| Checkpoint::open(folder));
    let inputs = inputs.collect::<Result<Vec<_>>>()?;
    let plan = match (command.to_str(), &inputs[..]) {
        (Some("apply"), [p, n, t]) => Plan::apply(p, n, t)?,
        (Some("extract"), [p, n]) => Plan::extract(p, n, bytes)?,
        _ => return Err(USAGE.into()),
    };
    plan.run(out, threads, sync)?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{}", json!({"seconds": seconds}));
    Ok(())
}

/// A folder of safetensors shards, mapped, and where each tensor's bytes lie in them.
struct Checkpoint {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, (usize, Range<usize>)>, // shard, bytes counted from the start of its file
}

struct Shard {
    name: OsString,
    map: Mmap,
    header: usize,
}

impl Checkpoint {
    fn open(folder: &Path) -> Result<Self> {
        let files = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name()));
        let mut files = files.collect::<Result<Vec<_>>>()?;
        files.retain(|file| Path::new(file).extension() == Some("safetensors".as_ref()));
        files.sort();
        let (mut shards, mut tensors) = (Vec::new(), BTreeMap::new());
        for name in files {
            // SAFETY: compare.py made these files, and nobody writes to them while it measures.
            let map = unsafe { Mmap::map(&File::open(folder.join(&name))?)? };
            let length = u64::from_le_bytes(*map.first_chunk().ok_or("a shard without a header")?);
            let header = 8 + usize::try_from(length)?;
            let rows: Map<String, Value> = serde_json::from_slice(&map[8..header])?;
            for (tensor, row) in rows.into_iter().filter(|(name, _)| name != "__metadata__") {
                let [begin, end]: [usize; 2] = serde_json::from_value(row["data_offsets"].clone())?;
                tensors.insert(tensor, (shards.len(), header + begin..header + end));
            }
            shards.push(Shard { name, map, header });
        }
        Ok(Self { shards, tensors })
    }

    /// Tensor names in the order of their bytes on disk.
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
        names.sort_by_key(|name| (self.tensors[*name].0, self.tensors[*name].1.start));
        names
    }

    fn tensor(&self, name: &str) -> Result<Piece<'_>> {
        let (shard, bytes) = self.tensors.get(name).ok_or(format!("no tensor {name}"))?;
        let map = &self.shards[*shard].map;
        Ok(Piece { map, bytes: bytes.clone() })
    }
}

/// A run of bytes in a mapped shard.
#[derive(Clone)]
struct Piece<'a> {
    map: &'a Mmap,
    bytes: Range<usize>,
}

impl<'a> Piece<'a> {
    fn windows(self) -> impl Iterator<Item = Piece<'a>> {
        let Range { start, end } = self.bytes;
        let windows = (start..end).step_by(WINDOW);
        windows.map(move |at| Piece { bytes: at..end.min(at + WINDOW), ..self })
    }

    fn first(&self, length: usize) -> Self {
        let start = self.bytes.start;
        Self { bytes: start..start + length, ..*self }
    }

    fn slice(&self) -> &[u8] {
        &self.map[self.bytes.clone()]
    }

    fn touch(&self) -> u64 {
        let words = self.slice().chunks(CACHE_LINE).filter_map(<[u8]>::first_chunk);
        words.fold(0, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)))
    }
}

/// One step of a worker: the inputs it reads, and the bytes it writes at a place in an output file.
struct Window<'a> {
    touched: [Piece<'a>; 2],
    copied: Piece<'a>,
    file: usize,
    at: u64,
}

struct Output<'a> {
    name: OsString,
    header: &'a [u8],
    length: u64,
}

struct Plan<'a> {
    outputs: Vec<Output<'a>>,
    windows: Vec<Window<'a>>,
}

impl<'a> Plan<'a> {
    /// Reads all three checkpoints and writes one laid out as the target is.
    fn apply(p: &'a Checkpoint, n: &'a Checkpoint, t: &'a Checkpoint) -> Result<Self> {
        let mut windows = Vec::new();
        for tensor in t.names() {
            let file = t.tensors[tensor].0;
            let donors = p.tensor(tensor)?.windows().zip(n.tensor(tensor)?.windows());
            for (copied, (p, n)) in t.tensor(tensor)?.windows().zip(donors) {
                let at = copied.bytes.start as u64;
                windows.push(Window { touched: [p, n], copied, file, at });
            }
        }
        let output = |Shard { name, map, header }: &'a Shard| Output {
            name: name.clone(),
            header: &map[..*header],
            length: map.len() as u64,
        };
        Ok(Self { outputs: t.shards.iter().map(output).collect(), windows })
    }

    /// Reads both donors and writes `bytes` bytes, spread evenly over the reading.
    fn extract(p: &'a Checkpoint, n: &'a Checkpoint, bytes: u64) -> Result<Self> {
        let total: usize = p.tensors.values().map(|(_, bytes)| bytes.len()).sum();
        if bytes > total as u64 {
            return Err(format!("--bytes is more than the {total} bytes of a donor").into());
        }
        let written_after = |read: usize| bytes as u128 * read as u128 / total as u128;
        let (mut windows, mut read) = (Vec::new(), 0);
        for tensor in p.names() {
            for (p, n) in p.tensor(tensor)?.windows().zip(n.tensor(tensor)?.windows()) {
                let at = written_after(read);
                read += p.bytes.len();
                let copied = p.first((written_after(read) - at) as usize);
                windows.push(Window { touched: [p, n], copied, file: 0, at: at as u64 });
            }
        }
        let name = "vector_model.safetensors".into();
        Ok(Self { outputs: vec![Output { name, header: &[], length: bytes }], windows })
    }

    fn run(&self, out: &Path, threads: usize, sync: bool) -> Result<()> {
        fs::create_dir_all(out)?;
        let partial = |output: &Output| out.join(format!("{}.partial", output.name.display()));
        let mut files = Vec::new();
        for output in &self.outputs {
            let file = File::create_new(partial(output))?;
            os::preallocate(&file, output.length)?;
            os::write_at(&file, output.header, 0)?;
            files.push(file);
        }
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.work(&next, &files))).collect();
            workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a worker panicked")?)
        })?;
        for (output, file) in self.outputs.iter().zip(files) {
            if sync {
                file.sync_all()?;
            }
            fs::rename(partial(output), out.join(&output.name))?;
        }
        Ok(())
    }

    fn work(&self, next: &AtomicUsize, files: &[File]) -> Result<()> {
        // A merge computes into a buffer of its own, so the copy goes through one here too.
        let mut buffer = vec![0; WINDOW];
        while let Some(window) = self.windows.get(next.fetch_add(1, Ordering::Relaxed)) {
            for piece in window.touched.iter().chain([&window.copied]) {
                os::populate(piece)?;
            }
            for piece in &window.touched {
                black_box(piece.touch());
            }
            let copy = &mut buffer[..window.copied.bytes.len()];
            copy.copy_from_slice(window.copied.slice());
            os::write_at(&files[window.file], copy, window.at)?;
            for piece in window.touched.iter().chain([&window.copied]) {
                os::release(piece)?;
            }
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
mod os {
    use super::{File, Piece, io};
    use memmap2::{Advice, UncheckedAdvice};
    use rustix::fs::{FallocateFlags, fallocate};
    use std::os::unix::fs::FileExt;

    pub(super) fn populate(piece: &Piece) -> io::Result<()> {
        piece.map.advise_range(Advice::PopulateRead, piece.bytes.start, piece.bytes.len())
    }

    pub(super) fn release(piece: &Piece) -> io::Result<()> {
        let Piece { map, bytes } = piece;
        // SAFETY: a shared map of a file: what is read there later is the file's bytes again.
        unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) }
    }

    pub(super) fn preallocate(file: &File, length: u64) -> io::Result<()> {
        Ok(fallocate(file, FallocateFlags::empty(), 0, length)?)
    }

    pub(super) fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        file.write_all_at(bytes, at)
    }
}

/// Elsewhere the pages come in as they are touched.
#[cfg(not(target_os = "linux"))]
mod os {
    use super::{File, Piece, io};

    pub(super) fn populate(_: &Piece) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn release(_: &Piece) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn preallocate(file: &File, length: u64) -> io::Result<()> {
        file.set_len(length)
    }

    #[cfg(unix)]
    pub(super) fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
    }

    #[cfg(windows)]
    pub(super) fn write_at(file: &File, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = std::os::windows::fs::FileExt::seek_write(file, bytes, at)?;
            (bytes, at) = (&bytes[written..], at + written as u64);
        }
        Ok(())
    }
}
