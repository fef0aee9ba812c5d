//! The files of a vector while they are being written: tile after tile, in order, each tensor's parts one behind the other. Only where a
//! tile's bytes go is decided in order; most of them are written by the workers, side by side ([`Pending`]).
//!
//! How long the parts of a tensor are is known only when its last tile is encoded, so the header's room is reserved in front and filled in at the
//! end. What belongs behind the values (escapes, corrections) waits in spools that move to disk when they grow.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::encode::{Codec, Packed};
use super::format::{Encoding, Part, Row, STEM};
use super::lowrank::{ROLES, rank};
use crate::bf16::{Bf16, Element};
use crate::dtype::Dtype;
use crate::store::digest::Stream;
use crate::store::header::Header;
use crate::store::map::{FileMap, Pool};
use crate::store::writer::{Writer, write_whole};
use crate::store::{Algorithm, TensorView};
use crate::stream::BLOCK;
use crate::{Error, Result};

/// Bytes of a spool that stay in memory.
const SPOOL: usize = 1 << 20;

/// A tensor that is being written.
pub struct Tensor<'a> {
    /// Its row, filled in as tiles come.
    pub row: Row,
    /// Its codec.
    pub codec: Arc<Codec>,
    /// Whether it is combined in f64.
    pub double: bool,
    /// The parts of a low-rank tensor, which are copied.
    pub factors: &'a [TensorView],
}

/// The files of a vector.
pub struct Assembly<'a> {
    folder: &'a Path,
    algorithm: Algorithm,
    sync: bool,
    shard_bytes: u64,
    reserve: u64,
    open: Option<Shard>,
    full: Vec<Shard>,
    current: Option<Current<'a>>,
    rows: Vec<Row>,
    spare: Spare,
}

/// Memory of runs that are written: systems take long to hand out as much anew.
#[derive(Default, Clone)]
struct Spare(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spare {
    fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give(&self, mut run: Vec<u8>) {
        run.clear();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(run);
    }
}

struct Shard {
    writer: Arc<Writer>,
    entries: Vec<(String, Dtype, Vec<u64>)>,
    /// Where the next byte goes.
    at: u64,
}

/// Bytes of a part that are gathered before they are written: a file takes one long write for less than half the price of ten short ones.
pub const RUN: usize = 1 << 19;

/// Bytes whose place is decided: to be written before the vector is finished.
#[must_use]
pub struct Pending {
    writer: Arc<Writer>,
    runs: Vec<(u64, Vec<u8>)>,
    spare: Spare,
}

impl Pending {
    /// Writes them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(self) -> Result<()> {
        for (at, bytes) in self.runs {
            self.writer.write_at(&bytes, at)?;
            self.spare.give(bytes);
        }
        Ok(())
    }
}

/// A part of a tensor while it grows.
struct Growing {
    digest: Stream,
    /// Where its next byte goes.
    at: u64,
    /// What stands before that and is not written yet.
    run: Vec<u8>,
}

impl Growing {
    fn new(digest: Stream, at: u64, spare: &Spare) -> Self {
        Self { digest, at, run: spare.take() }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.at += bytes.len() as u64;
        self.run.extend_from_slice(bytes);
    }

    /// What there is to write, once it is long enough, or the last.
    fn take(&mut self, last: bool, spare: &Spare) -> Option<(u64, Vec<u8>)> {
        let due = self.run.len() >= RUN || (last && !self.run.is_empty());
        let next = || if last { Vec::new() } else { spare.take() };
        due.then(|| (self.at - self.run.len() as u64, std::mem::replace(&mut self.run, next())))
    }
}

struct Current<'a> {
    tensor: Tensor<'a>,
    start: u64,
    bitmap: Growing,
    values: Growing,
    escapes: Spool,
    wide_at: Spool,
    wide_lo: Spool,
    starts: Vec<[u64; 2]>,
    wide_starts: Vec<u64>,
    squares: f64,
    residual: f64,
    max: f64,
    long: bool,
}

struct Spool(tempfile::SpooledTempFile, u64);

impl Spool {
    fn new(folder: &Path) -> Self {
        Self(tempfile::spooled_tempfile_in(SPOOL, folder), 0)
    }

    fn push(&mut self, bytes: &[u8], folder: &Path) -> Result<()> {
        self.1 += bytes.len() as u64;
        self.0.write_all(bytes).map_err(|e| Error::io(folder, "write a temporary file in", e))
    }
}

impl<'a> Assembly<'a> {
    /// Starts a vector whose tensors have these names.
    pub fn new<'n>(
        folder: &'a Path,
        algorithm: Algorithm,
        sync: bool,
        shard_bytes: u64,
        names: impl Iterator<Item = &'n str>,
    ) -> Self {
        // Every part that a tensor can have, with the longest numbers: an upper bound of the header.
        let entry = |name: &str| serde_json::Value::from(name).to_string().len() as u64 + 130;
        let reserve = names.map(|n| 9 * entry(n)).sum::<u64>() + 256;
        Self {
            folder,
            algorithm,
            sync,
            shard_bytes,
            reserve: reserve.next_multiple_of(8),
            open: None,
            full: Vec::new(),
            current: None,
            rows: Vec::new(),
            spare: Spare::default(),
        }
    }

    fn shard(&mut self) -> Result<&mut Shard> {
        if self.open.is_none() {
            let name = format!("{STEM}-{:05}.safetensors", self.full.len() + 1);
            let writer = Writer::open(&self.folder.join(name), true)?;
            self.open = Some(Shard { writer: Arc::new(writer), entries: Vec::new(), at: self.reserve });
        }
        self.open.as_mut().ok_or_else(|| Error::Usage("no open shard".into()))
    }

    /// Begins a tensor.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn begin(&mut self, tensor: Tensor<'a>) -> Result<()> {
        let (algorithm, folder) = (self.algorithm, self.folder);
        let start = self.shard()?.at;
        let dense = matches!(*tensor.codec, Codec::Dense | Codec::LowRank);
        let bitmap_len = if dense { 0 } else { tensor.row.elements.div_ceil(64) * 8 };
        self.current = Some(Current {
            start,
            bitmap: Growing::new(Stream::new(algorithm, 1), start, &self.spare),
            values: Growing::new(
                Stream::new(algorithm, tensor.codec.value_size(tensor.double) as usize),
                start + bitmap_len,
                &self.spare,
            ),
            escapes: Spool::new(folder),
            wide_at: Spool::new(folder),
            wide_lo: Spool::new(folder),
            starts: vec![[0, 0]],
            wide_starts: vec![0],
            squares: 0.0,
            residual: 0.0,
            max: 0.0,
            long: false,
            tensor,
        });
        Ok(())
    }

    /// Takes in the next tile of the tensor, and says what is now to be written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add(&mut self, tile: &Packed, last: bool) -> Result<Option<Pending>> {
        let folder = self.folder;
        let (Some(c), Some(shard)) = (self.current.as_mut(), self.open.as_ref()) else {
            return Err(Error::Usage("a tile without a tensor".into()));
        };
        c.bitmap.push(&tile.bitmap);
        c.values.push(&tile.values);
        c.escapes.push(&tile.escapes, folder)?;
        c.wide_at.push(&tile.wide_at, folder)?;
        c.wide_lo.push(&tile.wide_lo, folder)?;
        for &[values, escapes, wide] in &tile.counts {
            let [v, e] = c.starts[c.starts.len() - 1];
            c.starts.push([v + values, e + escapes]);
            c.wide_starts.push(c.wide_starts[c.wide_starts.len() - 1] + wide);
        }
        c.squares = tile.squares.iter().fold(c.squares, |sum, s| sum + s);
        c.residual = tile.residual.iter().fold(c.residual, |sum, s| sum + s);
        c.tensor.row.moved += tile.moved;
        c.tensor.row.inexact += tile.inexact;
        c.long |= tile.long;
        let runs: Vec<_> =
            [&mut c.bitmap, &mut c.values].into_iter().filter_map(|part| part.take(last, &self.spare)).collect();
        let pending = Pending { writer: shard.writer.clone(), runs, spare: self.spare.clone() };
        // At once: the values of a dense tensor, which are read again when it ends, and what may turn out to be a zero tensor, whose
        // place the next one takes.
        let dense = matches!(*c.tensor.codec, Codec::Dense);
        let zero = c.tensor.row.moved == 0 && c.wide_starts.last() == Some(&0);
        let later = match (dense || zero, zero && last) {
            (_, true) => None,
            (true, false) => {
                pending.write()?;
                None
            }
            (false, false) => Some(pending),
        };
        // Not `>` alone: a NaN that was let through must show.
        if tile.max > c.max || tile.max.is_nan() {
            c.max = tile.max;
            c.tensor.row.max_at = tile.max_at;
        }
        Ok(later)
    }

    /// Ends the tensor: what belongs behind its values follows them, and its row is complete.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn end(&mut self) -> Result<()> {
        let folder = self.folder;
        let algorithm = self.algorithm;
        let Some(c) = self.current.take() else { return Err(Error::Usage("no tensor to end".into())) };
        let shard = self.shard()?;
        let Current { tensor: Tensor { mut row, codec, double, factors }, start, .. } = c;
        let finite = |x: f64| x.is_finite().then_some(x);
        row.norm = finite(c.squares.sqrt());
        row.max = finite(c.max);
        if matches!(*codec, Codec::LowRank) {
            row.residual = finite(c.residual.sqrt());
        }
        row.wide = c.wide_starts.last().copied().unwrap_or(0);
        if row.moved == 0 && row.wide == 0 {
            row.encoding = Encoding::Zero;
            row.max_at = None;
            self.rows.push(row);
            return Ok(());
        }
        let mut parts = BTreeMap::new();
        let name = row.name.clone();
        let entry = |role: &str| {
            if role == "values" && matches!(*codec, Codec::Dense) { name.clone() } else { format!("{name}:{role}") }
        };
        let mut put = |shard: &mut Shard, role: &str, dtype: Dtype, shape: Vec<u64>, digest: Option<String>| {
            shard.at += shape.iter().product::<u64>() * dtype.size() as u64;
            shard.entries.push((entry(role), dtype, shape));
            parts.insert(role.to_owned(), Part { entry: entry(role), digest });
        };
        if let Codec::Dense = *codec {
            row.encoding = Encoding::Dense;
            let (dtype, digest) = if double {
                (Dtype::F64, c.values.digest.finish())
            } else if c.long {
                (Dtype::F32, c.values.digest.finish())
            } else {
                (Dtype::BF16, narrow_in_place(&shard.writer, start, row.elements, algorithm)?)
            };
            put(shard, "values", dtype, row.shape.clone(), digest);
        } else if let Codec::LowRank = *codec {
            row.encoding = Encoding::LowRank;
            let mut parts: Vec<(&str, &TensorView)> = ROLES.into_iter().zip(factors).collect();
            // The widest first: then nothing stands on an odd byte.
            parts.sort_by_key(|(_, view)| std::cmp::Reverse(view.dtype().size()));
            for (role, view) in parts {
                let digest = copy_part(shard, view, algorithm)?;
                put(shard, role, view.dtype(), view.entry.shape.clone(), digest);
            }
            row.rank = factors.get(1).map(rank);
        } else {
            row.encoding = Encoding::Sparse;
            put(shard, "bitmap", Dtype::U8, vec![c.bitmap.at - start], c.bitmap.digest.finish());
            let size = codec.value_size(double);
            let length = c.values.at - shard.at;
            let padded = length.next_multiple_of(8);
            let padding = vec![0u8; (padded - length) as usize];
            shard.writer.write_at(&padding, c.values.at)?;
            let mut values = c.values.digest;
            values.update(&padding);
            let dtype = match *codec {
                Codec::Palette(_) => Dtype::U8,
                Codec::Bf16 => Dtype::BF16,
                _ if double => Dtype::F64,
                _ => Dtype::F32,
            };
            put(shard, "values", dtype, vec![padded / size], values.finish());
            if let Codec::Palette(palette) = &*codec {
                let mut bytes: Vec<u8> = palette.values.iter().flat_map(|v| v.to_le_bytes()).collect();
                bytes.resize(bytes.len().next_multiple_of(8), 0);
                shard.writer.write_at(&bytes, shard.at)?;
                put(shard, "palette", Dtype::F32, vec![bytes.len() as u64 / 4], algorithm.digest_bytes(&bytes, 4));
            }
            if c.escapes.1 > 0 {
                let digest = pour(shard, c.escapes, 4, folder, algorithm)?;
                put(shard, "escapes", Dtype::F32, vec![digest.1 / 4], digest.0);
            }
            let bytes: Vec<u8> = c.starts.iter().flatten().flat_map(|w| w.to_le_bytes()).collect();
            shard.writer.write_at(&bytes, shard.at)?;
            put(shard, "starts", Dtype::U64, vec![c.starts.len() as u64, 2], algorithm.digest_bytes(&bytes, 8));
        }
        if row.wide > 0 {
            // A dense tensor of an odd size would leave what follows on an odd byte.
            let gap = shard.at.next_multiple_of(8) - shard.at;
            if gap > 0 {
                shard.writer.write_at(&vec![0u8; gap as usize], shard.at)?;
                put(shard, "padding", Dtype::U8, vec![gap], algorithm.digest_bytes(&vec![0u8; gap as usize], 1));
            }
            let (digest, len) = pour(shard, c.wide_at, 4, folder, algorithm)?;
            put(shard, "wide_at", Dtype::U32, vec![len / 4], digest);
            let (digest, len) = pour(shard, c.wide_lo, 8, folder, algorithm)?;
            put(shard, "wide_lo", Dtype::F64, vec![len / 8], digest);
            let bytes: Vec<u8> = c.wide_starts.iter().flat_map(|w| w.to_le_bytes()).collect();
            shard.writer.write_at(&bytes, shard.at)?;
            put(shard, "wide_starts", Dtype::U64, vec![c.wide_starts.len() as u64], algorithm.digest_bytes(&bytes, 8));
        }
        let gap = shard.at.next_multiple_of(8) - shard.at;
        if gap > 0 {
            let bytes = vec![0u8; gap as usize];
            shard.writer.write_at(&bytes, shard.at)?;
            put(shard, "padding", Dtype::U8, vec![gap], algorithm.digest_bytes(&bytes, 1));
        }
        row.bytes = shard.at - start;
        row.parts = parts;
        let size = shard.at;
        self.rows.push(row);
        if size - self.reserve >= self.shard_bytes {
            self.full.extend(self.open.take());
        }
        Ok(())
    }

    /// A tensor without data.
    pub fn zero(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Writes headers, gives the files their final names, the index last; the rows for the manifest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self) -> Result<Vec<Row>> {
        self.full.extend(self.open.take().filter(|s| !s.entries.is_empty()));
        let shards = std::mem::take(&mut self.full);
        let total = shards.len();
        let mut weight_map = serde_json::Map::new();
        let mut bytes = 0;
        for (i, shard) in shards.into_iter().enumerate() {
            let name = if total == 1 {
                format!("{STEM}.safetensors")
            } else {
                format!("{STEM}-{:05}-of-{total:05}.safetensors", i + 1)
            };
            for (entry, _, _) in &shard.entries {
                weight_map.insert(entry.clone(), name.clone().into());
            }
            bytes += shard.at - self.reserve;
            self.close(shard, &name)?;
        }
        if total > 1 {
            let index = serde_json::json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
            let path = self.folder.join(format!("{STEM}.safetensors.index.json"));
            write_whole(&path, format!("{index:#}\n").as_bytes(), self.sync)?;
        }
        Ok(self.rows)
    }

    fn close(&self, shard: Shard, name: &str) -> Result<()> {
        let Shard { writer, entries, at } = shard;
        let writer = Arc::into_inner(writer)
            .ok_or_else(|| Error::Usage(format!("{name} was closed too early; please report this")))?;
        let metadata = [("format".to_owned(), "reasonvec".to_owned())];
        let mut header = Header::build(&metadata, entries);
        let data = at - self.reserve;
        if self.reserve - header.len() as u64 <= data / 64 {
            header.resize(self.reserve as usize, b' ');
            header[..8].copy_from_slice(&(self.reserve - 8).to_le_bytes());
            writer.write_at(&header, 0)?;
            writer.set_len(at)?;
            return writer.finish_as(self.sync, Some(name));
        }
        // A small vector is moved up to its header rather than left with more blanks than numbers.
        let source = FileMap::open(writer.partial())?;
        let tight = Writer::open(&self.folder.join(name), true)?;
        tight.write_at(&header, 0)?;
        tight.copy_from(&source, self.reserve, header.len() as u64, data)?;
        tight.finish(self.sync)?;
        std::fs::remove_file(writer.partial()).map_err(|e| Error::io(writer.partial(), "remove", e))
    }

    /// Removes what was written: there is no final name yet.
    pub fn discard(self) {
        for shard in self.full.into_iter().chain(self.open) {
            // The reason for discarding is the error that matters.
            let _ = std::fs::remove_file(shard.writer.partial());
        }
    }
}

/// Copies a tensor of another file behind what is written; its digest.
fn copy_part(shard: &Shard, view: &TensorView, algorithm: Algorithm) -> Result<Option<String>> {
    let pool = Pool::default();
    let mut digest = Stream::new(algorithm, view.dtype().size());
    let (mut at, mut from) = (shard.at, 0);
    while from < view.elements() {
        let to = (from + BLOCK).min(view.elements());
        let bytes = view.window(from..to, &pool)?;
        digest.update(&bytes);
        shard.writer.write_at(&bytes, at)?;
        at += bytes.len() as u64;
        from = to;
    }
    Ok(digest.finish())
}

/// Moves a spool behind what is written, padded to 8 bytes; its digest and length.
fn pour(
    shard: &Shard,
    mut spool: Spool,
    item: usize,
    folder: &Path,
    algorithm: Algorithm,
) -> Result<(Option<String>, u64)> {
    let failed = |e| Error::io(folder, "read a temporary file in", e);
    spool.0.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut digest = Stream::new(algorithm, item);
    let mut buffer = vec![0u8; 1 << 18];
    let (mut done, padded) = (0, spool.1.next_multiple_of(8));
    while done < padded {
        let n = (padded - done).min(buffer.len() as u64) as usize;
        let real = (spool.1 - done).min(n as u64) as usize;
        spool.0.read_exact(&mut buffer[..real]).map_err(failed)?;
        buffer[real..n].fill(0);
        digest.update(&buffer[..n]);
        shard.writer.write_at(&buffer[..n], shard.at + done)?;
        done += n as u64;
    }
    Ok((digest.finish(), padded))
}

/// Turns f32 values that are all exact in bf16 into bf16, front to back over themselves.
fn narrow_in_place(writer: &Writer, start: u64, elements: u64, algorithm: Algorithm) -> Result<Option<String>> {
    let mut digest = Stream::new(algorithm, 2);
    let (mut long, mut short) = (vec![0u8; 1 << 18], vec![0u8; 1 << 17]);
    let mut done = 0;
    while done < elements {
        let n = ((elements - done) as usize).min(short.len() / 2);
        writer.read_at(&mut long[..n * 4], start + done * 4)?;
        for (s, l) in short.chunks_exact_mut(2).zip(long[..n * 4].chunks_exact(4)) {
            Bf16::narrow32(f32::load(l)).store(s);
        }
        digest.update(&short[..n * 2]);
        writer.write_at(&short[..n * 2], start + done * 2)?;
        done += n as u64;
    }
    Ok(digest.finish())
}
