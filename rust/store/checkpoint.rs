//! A checkpoint: a folder of safetensors shards (or one file), seen as one table of tensors.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::header::{Entry, Header, Unique};
use super::map::{FileMap, Pool, Window};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// One shard: its open file and its checked header.
#[derive(Debug)]
pub struct Shard {
    /// The name inside the folder.
    pub name: String,
    /// The open file.
    pub map: Arc<FileMap>,
    /// Its header.
    pub header: Header,
}

/// The tensors of a folder. Opening reads headers only.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    by_name: HashMap<String, (usize, usize)>,
    index: Option<String>,
    notes: Vec<String>,
}

/// One tensor: where its bytes lie.
#[derive(Debug, Clone)]
pub struct TensorView {
    map: Arc<FileMap>,
    /// Name, format, shape and place.
    pub entry: Entry,
}

impl Checkpoint {
    /// Opens a folder whose shards are called `model...`, or one `.safetensors` file.
    ///
    /// # Errors
    /// [`Error::Io`] for a missing file, [`Error::Format`] for hostile or damaged ones.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_named(path, "model")
    }

    /// Opens a folder whose shards are called `<stem>...`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_named(path: &Path, stem: &str) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        if meta.is_file() {
            let folder = path.parent().unwrap_or(Path::new("."));
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            return Self::with_shards(path, folder, vec![name], None, None);
        }
        let index_name = format!("{stem}.safetensors.index.json");
        let index_path = path.join(&index_name);
        if index_path.is_file() {
            let weight_map = read_index(&index_path)?;
            let names: BTreeSet<String> = weight_map.values().cloned().collect();
            return Self::with_shards(path, path, names.into_iter().collect(), Some(index_name), Some(weight_map));
        }
        let single = format!("{stem}.safetensors");
        if path.join(&single).is_file() {
            return Self::with_shards(path, path, vec![single], None, None);
        }
        let names = numbered_shards(path, stem)?;
        Self::with_shards(path, path, names, None, None)
    }

    fn with_shards(
        path: &Path,
        folder: &Path,
        names: Vec<String>,
        index: Option<String>,
        weight_map: Option<HashMap<String, String>>,
    ) -> Result<Self> {
        let mut shards = Vec::with_capacity(names.len());
        let mut by_name: HashMap<String, (usize, usize)> = HashMap::new();
        let mut notes = Vec::new();
        for name in names {
            let file = folder.join(&name);
            let map = FileMap::open(&file).map_err(|e| match e {
                Error::Io { path, source, .. } if source.kind() == std::io::ErrorKind::NotFound => Error::io(
                    path,
                    "open",
                    std::io::Error::new(source.kind(), "a shard of this checkpoint is missing; download it again"),
                ),
                other => other,
            })?;
            let header = Header::read(&map)?;
            for (i, entry) in header.entries.iter().enumerate() {
                if let Some(&(other, _)) = by_name.get(&entry.name) {
                    let other: &Shard = &shards[other];
                    return Err(Error::format(
                        &file,
                        format!(
                            "tensor {:?} is also in {}; two shards of one checkpoint may not hold the same name",
                            entry.name, other.name
                        ),
                    ));
                }
                by_name.insert(entry.name.clone(), (shards.len(), i));
                match weight_map.as_ref().map(|m| m.get(&entry.name)) {
                    Some(None) => notes.push(format!(
                        "{}: the index does not list {:?}, which is in {name}; the headers are the truth",
                        path.display(),
                        entry.name
                    )),
                    Some(Some(listed)) if *listed != name => notes.push(format!(
                        "{}: the index puts {:?} in {listed}, but it is in {name}; the headers are the truth",
                        path.display(),
                        entry.name
                    )),
                    _ => {}
                }
            }
            shards.push(Shard { name, map: Arc::new(map), header });
        }
        if let Some(map) = &weight_map {
            let mut gone: Vec<_> = map.keys().filter(|k| !by_name.contains_key(*k)).collect();
            gone.sort();
            if let Some(first) = gone.first() {
                return Err(Error::format(
                    path.join(index.as_deref().unwrap_or_default()),
                    format!(
                        "lists {} tensors that no shard holds, the first {first:?} in {}; the index is stale or a shard was replaced: download them again",
                        gone.len(),
                        map[*first]
                    ),
                ));
            }
        }
        Ok(Self { path: path.to_path_buf(), shards, by_name, index, notes })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The shards, by name.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The name of the index file, where there is one.
    pub fn index(&self) -> Option<&str> {
        self.index.as_deref()
    }

    /// Oddities that were survived: entries of a stale index.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Every tensor, in the order of shards and bytes.
    pub fn entries(&self) -> impl Iterator<Item = (&Shard, &Entry)> {
        self.shards.iter().flat_map(|s| s.header.entries.iter().map(move |e| (s, e)))
    }

    /// One tensor.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is none of that name.
    pub fn tensor(&self, name: &str) -> Result<TensorView> {
        let &(shard, entry) = self
            .by_name
            .get(name)
            .ok_or_else(|| Error::mismatch(name, format!("{} has no tensor of this name", self.path.display())))?;
        let shard = &self.shards[shard];
        Ok(TensorView { map: Arc::clone(&shard.map), entry: shard.header.entries[entry].clone() })
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }
}

impl TensorView {
    /// A tensor at a place of a file whose header is not written yet, or known already.
    pub fn at(map: &Arc<FileMap>, name: &str, dtype: Dtype, begin: u64, elements: u64) -> Self {
        let end = begin + elements * dtype.size() as u64;
        Self { map: Arc::clone(map), entry: Entry { name: name.to_owned(), dtype, shape: vec![elements], begin, end } }
    }

    /// Its format.
    pub fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    /// Its elements.
    pub fn elements(&self) -> u64 {
        (self.entry.end - self.entry.begin) / self.entry.dtype.size() as u64
    }

    /// The file that holds it.
    pub fn map(&self) -> &Arc<FileMap> {
        &self.map
    }

    /// Where some of its elements lie in the file.
    pub fn bytes(&self, elements: Range<u64>) -> Range<u64> {
        let size = self.entry.dtype.size() as u64;
        self.entry.begin + elements.start * size..self.entry.begin + elements.end * size
    }

    /// Some of its elements, as bytes in memory.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be read.
    pub fn window<'a>(&'a self, elements: Range<u64>, pool: &'a Pool) -> Result<Window<'a>> {
        self.map.window(self.bytes(elements), pool)
    }

    /// Starts reading some of its elements.
    pub fn prefetch(&self, elements: Range<u64>) {
        self.map.prefetch(self.bytes(elements));
    }

    /// The whole tensor, in memory; for the small tensors of an encoding.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; (self.entry.end - self.entry.begin) as usize];
        self.map.read_at(&mut bytes, self.entry.begin)?;
        Ok(bytes)
    }
}

/// Whether a name stays inside its folder: one plain component.
pub fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(n)), None) if n.to_str() == Some(name))
        && !name.contains(['\\', '/', ':', '\0'])
}

fn read_index(path: &Path) -> Result<HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Unique<String>,
    }
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "inspect", e))?;
    if meta.len() > super::header::LONGEST {
        return Err(Error::format(
            path,
            format!("an index of {} bytes is not credible; download it again", meta.len()),
        ));
    }
    let text = std::fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    let text = String::from_utf8(text).map_err(|e| Error::format(path, format!("the index is not UTF-8: {e}")))?;
    let index: Index = serde_json::from_str(&text)
        .map_err(|e| Error::format(path, format!("expected an object with a weight_map: {e}")))?;
    for (tensor, file) in &index.weight_map.0 {
        if !is_plain_name(file) || !file.ends_with(".safetensors") {
            return Err(Error::format(
                path,
                format!(
                    "puts tensor {tensor:?} in {file:?}, which is no .safetensors file of this folder; do not trust this checkpoint"
                ),
            ));
        }
    }
    Ok(index.weight_map.0.into_iter().collect())
}

/// `<stem>-0000k-of-0000n.safetensors` without an index: all n must be there.
fn numbered_shards(folder: &Path, stem: &str) -> Result<Vec<String>> {
    let listing = std::fs::read_dir(folder).map_err(|e| Error::io(folder, "list", e))?;
    let mut names: Vec<String> = Vec::new();
    let mut pickles = false;
    for item in listing {
        let name = item.map_err(|e| Error::io(folder, "list", e))?.file_name().to_string_lossy().into_owned();
        pickles |= Path::new(&name).extension().is_some_and(|e| e == "bin" || e == "pt" || e == "pth");
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    let count = |name: &str| -> Option<(u64, u64)> {
        let (k, n) = name.strip_prefix(stem)?.strip_prefix('-')?.strip_suffix(".safetensors")?.split_once("-of-")?;
        Some((k.parse().ok()?, n.parse().ok()?))
    };
    let mut numbered: Vec<(u64, u64, String)> =
        names.iter().filter_map(|n| count(n).map(|(k, total)| (k, total, n.clone()))).collect();
    numbered.sort();
    if let Some(&(_, total, _)) = numbered.first() {
        let whole = numbered.len() as u64 == total
            && numbered.iter().enumerate().all(|(i, &(k, n, _))| k == i as u64 + 1 && n == total);
        if !whole {
            return Err(Error::format(
                folder,
                format!(
                    "found {} of {total} shards {stem}-0000k-of-{total:05}.safetensors and no index; download the rest",
                    numbered.len()
                ),
            ));
        }
        return Ok(numbered.into_iter().map(|(_, _, n)| n).collect());
    }
    let hint = if pickles {
        "; it has pickled weights (.bin, .pt), which are never loaded because they can run code: convert them to safetensors first"
    } else if names.len() == 1 {
        "; name the file itself to open it"
    } else {
        ""
    };
    Err(Error::format(
        folder,
        format!("expected {stem}.safetensors, or {stem}.safetensors.index.json with its shards, found neither{hint}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::is_plain_name;

    #[test]
    fn names_that_leave_the_folder_are_seen() {
        for bad in ["../a.safetensors", "/etc/passwd", "a/b", "", ".", "..", "a\\b", "c:x", "./a", "a/"] {
            assert!(!is_plain_name(bad), "{bad}");
        }
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
    }
}
