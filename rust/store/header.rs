//! The header of a safetensors file, read as something that a stranger wrote.

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::map::FileMap;
use crate::dtype::Dtype;
use crate::{Error, Result};

/// The longest header that is read: the limit of the safetensors library.
pub const LONGEST: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its format.
    pub dtype: Dtype,
    /// Its shape; empty for a scalar.
    pub shape: Vec<u64>,
    /// Where its bytes start in the file.
    pub begin: u64,
    /// Where they end.
    pub end: u64,
}

/// A checked header.
#[derive(Debug, Clone)]
pub struct Header {
    /// Tensors, in the order of their bytes.
    pub entries: Vec<Entry>,
    /// `__metadata__`.
    pub metadata: Vec<(String, String)>,
    /// Bytes before the data: 8 plus the length of the JSON text.
    pub data_start: u64,
}

struct Raw {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, RawEntry)>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
    /// Fields of somebody else. They are read, not skipped: serde_json skips over what is no JSON, such as a number out of range.
    #[serde(flatten)]
    _others: HashMap<String, serde_json::Value>,
}

/// A map that refuses to hold a key twice, where serde_json's keeps the last.
pub(crate) struct Unique<T>(pub(crate) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct V<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Unique<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut seen = HashSet::new();
                let mut items = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("{key:?} stands twice")));
                    }
                    items.push((key, value));
                }
                Ok(Unique(items))
            }
        }
        d.deserialize_map(V(std::marker::PhantomData))
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Raw;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Raw, A::Error> {
                let mut seen = HashSet::new();
                let mut raw = Raw { metadata: Vec::new(), tensors: Vec::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format!("{key:?} stands twice")));
                    }
                    if key == "__metadata__" {
                        raw.metadata = map.next_value::<Option<Unique<String>>>()?.map_or_else(Vec::new, |m| m.0);
                    } else {
                        let entry = map
                            .next_value::<RawEntry>()
                            .map_err(|e| A::Error::custom(format!("tensor {key:?}: {e}")))?;
                        raw.tensors.push((key, entry));
                    }
                }
                Ok(raw)
            }
        }
        d.deserialize_map(V)
    }
}

impl Header {
    /// Reads and checks the header of an open file.
    ///
    /// # Errors
    /// [`Error::Format`] for anything that the format forbids: a length past the file or past [`LONGEST`], text that is not JSON, duplicate names,
    /// unknown formats, shapes that overflow or do not match their bytes, offsets outside the file, overlaps and holes.
    pub fn read(map: &FileMap) -> Result<Self> {
        let bad = |problem: String| Error::format(map.path(), problem);
        let file_len = map.len();
        if file_len < 8 {
            return Err(bad(format!(
                "expected a safetensors file of at least 8 bytes, found {file_len}; download it again"
            )));
        }
        let mut length = [0u8; 8];
        map.read_at(&mut length, 0)?;
        let length = u64::from_le_bytes(length);
        if length > LONGEST || length > file_len - 8 {
            return Err(bad(format!(
                "the header says it is {length} bytes long, but the file has {} after the length and the limit is {LONGEST}; \
                 this is no safetensors file, or a truncated one: download it again",
                file_len - 8
            )));
        }
        let mut text = vec![0u8; length as usize];
        map.read_at(&mut text, 8)?;
        let text = std::str::from_utf8(&text).map_err(|e| bad(format!("the header is not UTF-8: {e}")))?;
        Self::parse(text, file_len - 8 - length).map_err(bad)
    }

    /// Checks a header's text against the number of data bytes that follow it.
    ///
    /// # Errors
    /// What is wrong, in words, without the path.
    pub fn parse(text: &str, data_len: u64) -> std::result::Result<Self, String> {
        if !text.starts_with('{') {
            return Err("the header does not begin with '{'".into());
        }
        let raw: Raw = serde_json::from_str(text).map_err(|e| format!("the header: {e}"))?;
        let data_start = 8 + text.len() as u64;
        let mut entries = Vec::with_capacity(raw.tensors.len());
        for (name, raw) in raw.tensors {
            let dtype = Dtype::parse(&raw.dtype).ok_or_else(|| {
                format!("tensor {name:?} has the format {:?}, which this version does not know; dequantise or convert it first", raw.dtype)
            })?;
            let [begin, end] = raw.data_offsets;
            if begin > end || end > data_len {
                return Err(format!(
                    "tensor {name:?} lies at {begin}..{end}, outside the file's {data_len} data bytes; the file is truncated or damaged: download it again"
                ));
            }
            let expected = raw
                .shape
                .iter()
                .try_fold(1u64, |n, &d| n.checked_mul(d))
                .and_then(|n| n.checked_mul(dtype.size() as u64))
                .ok_or_else(|| format!("tensor {name:?}: the shape {:?} overflows", raw.shape))?;
            if expected != end - begin {
                return Err(format!(
                    "tensor {name:?}: shape {:?} of {dtype} needs {expected} bytes, its offsets {begin}..{end} hold {}",
                    raw.shape,
                    end - begin
                ));
            }
            entries.push(Entry { name, dtype, shape: raw.shape, begin, end });
        }
        entries.sort_by_key(|e| (e.begin, e.end));
        let mut at = 0;
        for e in &mut entries {
            if e.begin != at {
                let what = if e.begin < at { "overlaps the tensor before it" } else { "leaves a hole before it" };
                return Err(format!("tensor {:?} at {}..{} {what} (expected it at {at})", e.name, e.begin, e.end));
            }
            at = e.end;
            e.begin += data_start;
            e.end += data_start;
        }
        if at != data_len {
            return Err(format!(
                "the tensors end at {at}, but the file has {data_len} data bytes; it is damaged: download it again"
            ));
        }
        Ok(Self { entries, metadata: raw.metadata, data_start })
    }

    /// The bytes of a header (length and JSON text) for tensors laid out one after another, padded so that the data starts on 8 bytes.
    pub fn build(
        metadata: &[(String, String)],
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<u64>)>,
    ) -> Vec<u8> {
        let mut object = serde_json::Map::new();
        if !metadata.is_empty() {
            let meta = metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
            object.insert("__metadata__".into(), serde_json::Value::Object(meta));
        }
        let mut at = 0u64;
        for (name, dtype, shape) in tensors {
            let end = at + shape.iter().product::<u64>() * dtype.size() as u64;
            object.insert(name, serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [at, end]}));
            at = end;
        }
        let mut text = serde_json::Value::Object(object).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text);
        bytes
    }
}
