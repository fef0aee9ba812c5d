//! A folder of files, opened as a checkpoint.
//!
//! Each file: a byte whose low bits choose its name and whose highest bit says whether a length goes in front of the text, a byte for the
//! length of the data behind it, two bytes for the length of the text, the text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use reasonvec::Error;
use reasonvec::store::{Checkpoint, Pool};

const NAMES: [&str; 8] = [
    "model.safetensors.index.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model-00001-of-00001.safetensors",
    "model-2-of-1.safetensors",
    "other.safetensors",
    "pytorch_model.bin",
];

fuzz_target!(|input: &[u8]| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut rest = input;
    while let Some((&[kind, data, low, high], tail)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([low, high])).min(tail.len());
        let (text, tail) = tail.split_at(length);
        let mut bytes = Vec::new();
        if kind & 0x80 != 0 {
            bytes.extend((text.len() as u64).to_le_bytes());
        }
        bytes.extend(text);
        bytes.resize(bytes.len() + usize::from(data), 0);
        std::fs::write(folder.path().join(NAMES[usize::from(kind) % NAMES.len()]), bytes).expect("a file");
        rest = tail;
    }
    let checkpoint = match Checkpoint::open(folder.path()) {
        Ok(checkpoint) => checkpoint,
        Err(Error::Format { .. } | Error::Io { .. }) => return,
        Err(other) => panic!("{other:?}"),
    };
    let pool = Pool::default();
    for (shard, entry) in checkpoint.entries() {
        let tensor = checkpoint.tensor(&entry.name).expect("a tensor that is listed");
        let window = tensor.window(0..tensor.elements(), &pool).expect("a tensor inside its file");
        assert_eq!(window.len() as u64, entry.end - entry.begin);
        assert!(entry.end <= shard.map.len());
    }
});
