//! Files from strangers: headers, indexes and vector manifests that lie. None may panic, hang or take memory that no file holds;
//! each is refused with the name of the file, and of the tensor where there is one. The oracle for headers is the `safetensors` crate.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{Family, Tensor, apply, apply_plan, how, plan, stored, write_checkpoint, write_shard};
use proptest::prelude::*;
use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::operand::{Source, Term};
use reasonvec::plan::{Operand, Operands};
use reasonvec::simd::Level;
use reasonvec::store::header::Header;
use reasonvec::store::{Checkpoint, Pool};
use reasonvec::stream::{BLOCK, Control};
use reasonvec::vector::VectorFolder;
use serde_json::{Value, json};

// -- headers

/// A file with this header and so many zero bytes of data.
fn file(text: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// Whether the `safetensors` crate takes it.
fn oracle(text: &str, data: usize) -> bool {
    safetensors::SafeTensors::read_metadata(&file(text.as_bytes(), data)).is_ok()
}

#[derive(serde::Deserialize)]
struct Corpus {
    cases: Vec<HeaderCase>,
}

/// One header of `tests/corpus/headers.json`.
#[derive(serde::Deserialize)]
struct HeaderCase {
    what: String,
    header: String,
    data: usize,
    /// What the refusal says; empty for a header that is taken.
    says: Vec<String>,
    /// Whether we refuse what the format's own library takes.
    #[serde(default)]
    stricter: bool,
}

fn corpus() -> Vec<HeaderCase> {
    let text = include_str!("corpus/headers.json");
    serde_json::from_str::<Corpus>(text).unwrap().cases
}

#[test]
fn the_corpus_of_headers_is_refused_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for case in corpus() {
        std::fs::write(&path, file(case.header.as_bytes(), case.data)).unwrap();
        let what = &case.what;
        let taken = case.says.is_empty();
        assert_eq!(oracle(&case.header, case.data), taken || case.stricter, "safetensors on {what}");
        match (Checkpoint::open(folder.path()), taken) {
            (Ok(_), true) => {}
            (Err(Error::Format { path: named, problem }), false) => {
                assert_eq!(named, path, "{what}");
                case.says.iter().for_each(|s| assert!(problem.contains(s), "{what}: {problem:?} does not say {s:?}"));
                assert!(problem.len() <= 1600, "{what}: {} characters", problem.len());
            }
            (other, _) => panic!("{what}: {:?}", other.map(|c| c.len())),
        }
    }
}

fn refused(path: &Path) -> String {
    match Checkpoint::open(path).unwrap_err() {
        Error::Format { path, problem } => format!("{}: {problem}", path.display()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn lengths_that_lie_are_seen_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let good = file(header, 4);
    let with_length = |n: u64| [&n.to_le_bytes()[..], &good[8..]].concat();
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("empty", Vec::new(), "at least 8 bytes, found 0"),
        ("short", good[..7].to_vec(), "at least 8 bytes, found 7"),
        ("past the file", with_length(header.len() as u64 + 5), "59 bytes long"),
        ("a pickle", b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x08builtins".to_vec(), "no safetensors file"),
        ("as long as can be", with_length(u64::MAX), "18446744073709551615 bytes long"),
        ("past the limit", with_length(100_000_001), "the limit is 100000000"),
        ("cut in the data", good[..good.len() - 1].to_vec(), "truncated"),
        ("not UTF-8", file(b"{\"\xFF\":{}}", 0), "not UTF-8"),
    ];
    for (what, bytes, says) in cases {
        std::fs::write(&path, bytes).unwrap();
        for opened in [folder.path(), &path] {
            let said = refused(opened);
            assert!(said.contains(says) && said.contains("model.safetensors"), "{what}: {said}");
        }
    }
}

#[test]
fn a_length_at_the_limit_is_read_and_one_past_it_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let file = std::fs::File::create(&path).unwrap();
    // Sparse: holes read as NUL, which is no JSON.
    file.set_len(8 + 100_000_001).unwrap();
    for (length, says) in [(100_000_000u64, "begin with '{'"), (100_000_001, "limit")] {
        std::fs::write(&path, length.to_le_bytes()).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8 + 100_000_001).unwrap();
        let said = refused(&path);
        assert!(said.contains(says), "{said}");
    }
}

#[test]
fn depth_is_no_stack_overflow() {
    for open in ["{\"a\":", "[", "{\"a\":{\"dtype\":", "{\"__metadata__\":{\"a\":", "{\"a\":{\"x\":["] {
        let text = format!("{{\"a\":{{\"x\":{}", open.repeat(200_000));
        assert!(Header::parse(&text, 0).is_err());
        assert!(Header::parse(&open.repeat(200_000), 0).is_err());
    }
    let nested = |depth: usize| {
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        format!(r#"{{"w":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"extra":{open}{close}}}}}"#)
    };
    for depth in [1, 20, 100, 126, 127, 128, 129, 1000, 100_000] {
        assert_eq!(Header::parse(&nested(depth), 1).is_ok(), oracle(&nested(depth), 1), "{depth}");
    }
}

/// Headers that are nearly right: tensors one after another, with a number of changes.
fn nearly() -> impl Strategy<Value = (String, usize)> {
    let dtype = prop::sample::select(&["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0"][..]);
    let shape = prop::collection::vec(prop_oneof![6 => 0u64..5, 1 => Just(1)], 0..4);
    let name = prop_oneof![8 => "[a-z.0-9]{1,8}", 1 => any::<String>(), 1 => Just("__metadata__".to_owned())];
    let tensors = prop::collection::vec((name, dtype, shape), 0..6);
    let change = (0usize..12, any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u64>());
    let metadata = prop::option::of(prop::collection::vec((any::<String>(), any::<String>()), 0..3));
    (tensors, metadata, prop::collection::vec(change, 0..3), any::<bool>()).prop_map(|(tensors, metadata, changes, shuffle)| {
        let mut at = 0;
        let mut items: Vec<(String, Value)> = Vec::new();
        for (name, dtype, shape) in tensors {
            let end = at + shape.iter().product::<u64>() * Dtype::parse(dtype).unwrap().size() as u64;
            if name == "__metadata__" {
                continue;
            }
            items.push((name, json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]})));
            at = end;
        }
        if let Some(pairs) = metadata {
            items.push(("__metadata__".into(), Value::Object(pairs.into_iter().map(|(k, v)| (k, v.into())).collect())));
        }
        if shuffle {
            items.reverse();
        }
        let mut data = at;
        for (kind, which, other, number) in changes {
            if items.is_empty() {
                break;
            }
            let (i, j) = (which.index(items.len()), other.index(items.len()));
            let small = number % 9;
            if !items[i].1.is_object() && kind != 0 {
                continue;
            }
            match kind {
                0 => data = data.wrapping_add(small).wrapping_sub(4) % 4096,
                1 => items[i].1["data_offsets"] = json!([small, number % 64]),
                2 => items[i].1["data_offsets"] = json!([number]),
                3 => items[i].1["shape"] = json!([number, number >> 32]),
                4 => items[i].1["shape"] = json!([number, 0]),
                5 => items[i].1["dtype"] = json!(["F4", "f32", "", "F8_E4M3FNUZ", "BF16 "][small as usize % 5]),
                6 => items[i].1["extra"] = json!({"a": [number, null, {"b": 1.5}]}),
                7 => items[i].1 = [Value::Null, json!([]), json!("F32"), json!(number), json!({})][small as usize % 5].clone(),
                8 => items[i].0 = items[j].0.clone(),
                9 => items[i].1["data_offsets"] = json!([-1, 1.5]),
                10 => items[i].1["shape"] = json!(small),
                _ => items.swap(i, j),
            }
        }
        let body: Vec<String> = items.iter().map(|(k, v)| format!("{}:{v}", Value::from(k.as_str()))).collect();
        (format!("{{{}}}", body.join(",")), data as usize)
    })
}

/// Whether a header has what the format forbids and its library lets pass, or what only a newer library knows.
fn stricter(text: &str, problem: &str) -> bool {
    problem.contains("stands twice") || problem.contains("does not know") || !text.starts_with('{')
}

fn agrees(text: &str, data: usize) -> Result<(), TestCaseError> {
    match (Header::parse(text, data as u64), oracle(text, data)) {
        (Ok(header), true) => {
            let bytes = file(text.as_bytes(), data);
            let (n, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
            prop_assert_eq!(header.data_start, n as u64 + 8);
            prop_assert_eq!(header.entries.len(), metadata.tensors().len());
            for entry in &header.entries {
                let info = metadata.info(&entry.name).unwrap();
                let range = info.data_offsets.0 as u64 + header.data_start..info.data_offsets.1 as u64 + header.data_start;
                prop_assert_eq!(entry.begin..entry.end, range);
                prop_assert!(info.shape.iter().map(|&d| d as u64).eq(entry.shape.iter().copied()));
                prop_assert_eq!(info.dtype.to_string(), entry.dtype.name());
            }
        }
        (Ok(_), false) => prop_assert!(false, "taken, but safetensors refuses it"),
        (Err(problem), true) => prop_assert!(stricter(text, &problem), "safetensors takes it, but: {}", problem),
        (Err(problem), false) => prop_assert!(problem.len() < 4096),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn nearly_right_headers_are_judged_as_safetensors_judges_them((text, data) in nearly()) {
        agrees(&text, data)?;
    }

    #[test]
    fn one_changed_byte_is_judged_so_too((text, data) in nearly(), at in any::<prop::sample::Index>(), byte in prop_oneof![any::<u8>(), prop::sample::select(&b"\"{}[]:,\\0123456789-eE. \n"[..])]) {
        let mut bytes = text.into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(text) = String::from_utf8(bytes) {
            agrees(&text, data)?;
        }
    }

    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, &bytes).unwrap();
        if let Err(e) = Checkpoint::open(folder.path()) {
            prop_assert!(matches!(e, Error::Format { .. }), "{}", e);
        }
    }

    #[test]
    fn what_is_built_is_read(tensors in prop::collection::vec((any::<String>(), 0usize..4, prop::collection::vec(0u64..4, 0..3)), 0..5)) {
        let dtypes = [Dtype::BF16, Dtype::F64, Dtype::U8, Dtype::F8E8M0];
        let mut seen = std::collections::HashSet::new();
        let tensors: Vec<(String, Dtype, Vec<u64>)> = tensors
            .into_iter()
            .filter(|(n, _, _)| n != "__metadata__" && seen.insert(n.clone()))
            .map(|(n, d, s)| (n, dtypes[d], s))
            .collect();
        let bytes = Header::build(&[("format".into(), "pt".into())], tensors.clone());
        prop_assert_eq!(bytes.len() % 8, 0);
        let data: u64 = tensors.iter().map(|(_, d, s)| s.iter().product::<u64>() * d.size() as u64).sum();
        let text = std::str::from_utf8(&bytes[8..]).unwrap();
        agrees(text, data as usize)?;
        let header = Header::parse(text, data).unwrap();
        let mut read: Vec<_> = header.entries.into_iter().map(|e| (e.name, e.dtype, e.shape)).collect();
        let mut written = tensors;
        read.sort_by(|a, b| a.0.cmp(&b.0));
        written.sort_by(|a, b| a.0.cmp(&b.0));
        prop_assert_eq!(read, written);
    }
}

// -- indexes and folders

fn shard(name: &str) -> Tensor {
    Tensor::floats(name, Dtype::F32, [1.0, 2.0])
}

/// A folder of two shards with `a` and `b`, and this index.
fn indexed(index: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &[vec![shard("a")], vec![shard("b")]]);
    std::fs::write(folder.path().join(INDEX), index).unwrap();
    folder
}

const INDEX: &str = "model.safetensors.index.json";
const ONE: &str = "model-00001-of-00002.safetensors";
const TWO: &str = "model-00002-of-00002.safetensors";

#[test]
fn indexes_that_leave_the_folder_are_refused() {
    for place in [
        "../model.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "/etc/hosts.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "c:model.safetensors",
        "\\\\host\\share.safetensors",
        "model\0.safetensors",
        "model.safetensors\0",
        "./model.safetensors",
        "model.safetensors/",
        "model.safetensors/..",
        "file:///model.safetensors",
        "pytorch_model.bin",
        "config.json",
    ] {
        let index = json!({"weight_map": {"a": ONE, "evil.weight": place}}).to_string();
        let folder = indexed(&index);
        let said = refused(folder.path());
        assert!(said.contains(INDEX) && said.contains("evil.weight") && said.contains("do not trust"), "{place}: {said}");
    }
}

#[test]
fn indexes_that_are_none_are_refused() {
    let deep = format!("{{\"weight_map\":{}", "[".repeat(100_000));
    let cases = [
        ("", "weight_map"),
        ("null", "weight_map"),
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        (r#"{"weight_map": []}"#, "weight_map"),
        (r#"{"weight_map": {"a": 1}}"#, "weight_map"),
        (r#"{"weight_map": {"a": ["x"]}}"#, "weight_map"),
        (r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}"#, "twice"),
        (r#"{"weight_map": {}, "weight_map": {}}"#, "weight_map"),
        (&deep, "weight_map"),
    ];
    for (index, says) in cases {
        let folder = indexed(index);
        let said = refused(folder.path());
        assert!(said.contains(INDEX) && said.contains(says), "{said}");
    }
    let folder = indexed("");
    std::fs::write(folder.path().join(INDEX), b"{\"weight_map\":{\"\xFF\":\"x\"}}").unwrap();
    assert!(refused(folder.path()).contains(INDEX));
}

#[test]
fn indexes_that_name_what_is_not_there_are_refused() {
    let folder = indexed(&json!({"weight_map": {"a": ONE, "b": TWO, "lost.weight": TWO}}).to_string());
    let said = refused(folder.path());
    assert!(said.contains(INDEX) && said.contains("lost.weight") && said.contains(TWO), "{said}");

    let folder = indexed(&json!({"weight_map": {"a": ONE, "b": "model-00003-of-00003.safetensors"}}).to_string());
    match Checkpoint::open(folder.path()).unwrap_err() {
        Error::Io { path, source, .. } => {
            assert_eq!(path, folder.path().join("model-00003-of-00003.safetensors"));
            assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
            assert!(source.to_string().contains("missing"), "{source}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn an_index_that_is_only_stale_is_survived_with_a_note() {
    let folder = indexed(&json!({"weight_map": {"a": TWO, "b": ONE}}).to_string());
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(opened.notes().len(), 2);
    assert!(opened.tensor("a").unwrap().map().path().ends_with(ONE));

    let folder = indexed(&json!({"weight_map": {"a": ONE, "b": TWO}}).to_string());
    write_shard(&folder.path().join(ONE), &[shard("a"), shard("unlisted")]);
    let opened = Checkpoint::open(folder.path()).unwrap();
    assert!(opened.contains("unlisted") && opened.notes()[0].contains("unlisted"));
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let folder = indexed(&json!({"weight_map": {"a": ONE, "b": TWO}}).to_string());
    write_shard(&folder.path().join(TWO), &[shard("b"), shard("a")]);
    for _ in 0..2 {
        let said = refused(folder.path());
        assert!(said.contains("\"a\"") && said.contains(ONE) && said.contains(TWO), "{said}");
        // Without the index the shards' own numbers say the same.
        let _ = std::fs::remove_file(folder.path().join(INDEX));
    }
}

#[test]
fn a_bad_shard_is_named_by_its_file_and_tensor() {
    let folder = indexed(&json!({"weight_map": {"a": ONE, "b": TWO}}).to_string());
    let whole = std::fs::read(folder.path().join(TWO)).unwrap();
    std::fs::write(folder.path().join(TWO), &whole[..whole.len() - 3]).unwrap();
    let said = refused(folder.path());
    assert!(said.contains(TWO) && said.contains("\"b\"") && said.contains("truncated"), "{said}");
}

#[test]
fn folders_without_a_whole_checkpoint_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let touch = |name: &str| std::fs::write(folder.path().join(name), b"").unwrap();
    assert!(refused(folder.path()).contains("found neither"));
    touch("pytorch_model.bin");
    let said = refused(folder.path());
    assert!(said.contains("never loaded") && said.contains("convert"), "{said}");
    write_shard(&folder.path().join("model-00002-of-00003.safetensors"), &[shard("b")]);
    assert!(refused(folder.path()).contains("1 of 3"));
    write_shard(&folder.path().join("model-00001-of-00003.safetensors"), &[shard("a")]);
    write_shard(&folder.path().join("model-00003-of-00004.safetensors"), &[shard("c")]);
    assert!(refused(folder.path()).contains("3 of 3"));
    let numbers = tempfile::tempdir().unwrap();
    for name in ["model-18446744073709551615-of-18446744073709551615.safetensors", "model-0-of-1.safetensors", "model-x-of-y.safetensors"] {
        write_shard(&numbers.path().join(name), &[shard("a")]);
        assert!(Checkpoint::open(numbers.path()).is_err());
    }
    let missing = folder.path().join("nowhere");
    assert!(matches!(Checkpoint::open(&missing).unwrap_err(), Error::Io { path, .. } if path == missing));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_and_not_waited_for() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let fifo = |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let folder = indexed(&json!({"weight_map": {"a": ONE, "b": TWO}}).to_string());
    std::fs::remove_file(folder.path().join(TWO)).unwrap();
    fifo(&folder.path().join(TWO));
    let said = within_seconds(folder.path().to_path_buf(), |p| refused(&p));
    assert!(said.contains(TWO) && said.contains("regular file"), "{said}");
    std::fs::remove_file(folder.path().join(TWO)).unwrap();
    std::fs::create_dir(folder.path().join(TWO)).unwrap();
    assert!(refused(folder.path()).contains("regular file"));

    let vector = tempfile::tempdir().unwrap();
    fifo(&vector.path().join("vector_config.json"));
    let said = within_seconds(vector.path().to_path_buf(), |p| VectorFolder::open(&p).unwrap_err().to_string());
    assert!(said.contains("vector_config.json") && said.contains("regular file"), "{said}");
}

/// Runs something on a thread of its own, so that a test fails where it would hang.
fn within_seconds<A: Send + 'static, R: Send + 'static>(a: A, f: impl FnOnce(A) -> R + Send + 'static) -> R {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(f(a)));
    receive.recv_timeout(std::time::Duration::from_secs(20)).unwrap()
}

proptest! {
    #[test]
    fn folders_of_noise_never_panic(
        names in prop::collection::vec(prop_oneof![
            Just(INDEX.to_owned()), Just(ONE.to_owned()), Just(TWO.to_owned()), Just("model.safetensors".to_owned()), "model-[0-9]{1,3}-of-[0-9]{1,3}\\.safetensors",
        ], 1..4),
        texts in prop::collection::vec(prop_oneof![
            any::<String>(),
            nearly().prop_map(|(t, _)| t),
            prop::collection::hash_map(any::<String>(), any::<String>(), 0..3).prop_map(|m| json!({"weight_map": m}).to_string()),
        ], 4),
        data in 0usize..64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in names.iter().zip(&texts) {
            let bytes = if name == INDEX { text.clone().into_bytes() } else { file(text.as_bytes(), data) };
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        match Checkpoint::open(folder.path()) {
            Ok(_) | Err(Error::Format { .. } | Error::Io { .. }) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }
}

// -- vectors

/// A vector folder that can be spoiled: its manifest as JSON, and the entries of its data file.
struct Spoil {
    family: Family,
    config: Value,
    data: Vec<Tensor>,
}

impl Spoil {
    /// Tensors of `n` elements in every encoding: `codes` and `short` with escapes, `full`, `every` (dense), `none`; `every` and `full` with second parts.
    fn new(n: u64) -> Self {
        let weights = |seed: u64| Tensor::floats("", Dtype::BF16, (0..n).map(|i| 1.0 + ((i * seed) % 64) as f64 / 128.0));
        let named = |name: &str, base: &Tensor, dtype: Dtype, step: &dyn Fn(u64) -> Option<f64>| {
            let values = (0..n).map(|i| step(i).unwrap_or_else(|| common::widen(base.dtype, base.bit(i as usize))));
            Tensor::floats(name, dtype, values)
        };
        let base = weights(7);
        let old = |i: u64| common::widen(Dtype::BF16, base.bit(i as usize));
        let steps: [(&str, Dtype, &dyn Fn(u64) -> Option<f64>); 5] = [
            ("codes", Dtype::BF16, &|i| if i % 50 == 3 { Some(0.003) } else if i % 5 == 0 { Some(old(i) + 0.0078125) } else { None }),
            ("short", Dtype::F32, &|i| if i % 50 == 3 { Some(old(i) + 0.001) } else if i % 4 == 0 { Some(old(i) + (i / 4 % 120 + 1) as f64 / 1024.0) } else { None }),
            ("full", Dtype::F32, &|i| if i % 8 == 0 { Some(1e-30 * (i + 1) as f64) } else { (i % 2 == 1).then(|| old(i) + (i as f64 + 0.3) / 900.0) }),
            ("every", Dtype::F32, &|i| if i % 9 == 0 { Some(1e-30) } else { Some(old(i) + (i as f64 + 0.3) / 1000.0) }),
            ("none", Dtype::BF16, &|_| None),
        ];
        let positive: Vec<Tensor> = steps.iter().map(|(name, dtype, step)| named(name, &base, *dtype, step)).collect();
        let negative: Vec<Tensor> = steps.iter().map(|(name, dtype, _)| named(name, &base, *dtype, &|_| None)).collect();
        let mut family = Family::new(&[positive], &[negative.clone()], &[negative]);
        let rows = family.extract("auto");
        let forms: Vec<_> = rows.iter().map(|r| serde_json::to_value(r.encoding).unwrap()).collect();
        assert_eq!(forms, ["sparse", "sparse", "sparse", "dense", "zero"]);
        let known = |r: &reasonvec::vector::Row| (r.parts.contains_key("escapes"), r.wide > 1);
        let known: Vec<_> = rows.iter().map(known).collect();
        assert_eq!(known, [(true, false), (true, false), (false, true), (false, true), (false, false)]);
        let config = serde_json::from_str(&std::fs::read_to_string(family.path("v").join(CONFIG)).unwrap()).unwrap();
        let mut spoil = Self { family, config, data: Vec::new() };
        spoil.load();
        // Digests would see every change before the checks that are to be tested.
        spoil.config["digest"] = "none".into();
        spoil
    }

    fn load(&mut self) {
        let bytes = std::fs::read(self.family.path("v").join(DATA)).unwrap();
        let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = Header::parse(std::str::from_utf8(&bytes[8..start]).unwrap(), (bytes.len() - start) as u64).unwrap();
        let tensor = |e: reasonvec::store::header::Entry| Tensor {
            name: e.name,
            dtype: e.dtype,
            shape: e.shape,
            bytes: bytes[e.begin as usize..e.end as usize].to_vec(),
        };
        self.data = header.entries.into_iter().map(tensor).collect();
    }

    fn save(&mut self) {
        // How many bytes a row says it has would tell on every other change; one case is about it.
        for row in self.config.get_mut("tensors").and_then(Value::as_array_mut).into_iter().flatten().filter(|r| r["bytes"] != u64::MAX && r.is_object()) {
            let entries: Vec<&str> = row["parts"].as_object().unwrap().values().filter_map(|p| p["entry"].as_str()).collect();
            let held = self.data.iter().filter(|t| entries.contains(&t.name.as_str())).map(|t| t.bytes.len());
            let held: usize = held.sum();
            row["bytes"] = held.into();
        }
        std::fs::write(self.family.path("v").join(CONFIG), self.config.to_string()).unwrap();
        write_shard(&self.family.path("v").join(DATA), &self.data);
    }

    fn row(&mut self, name: &str) -> &mut Value {
        let rows = self.config["tensors"].as_array_mut().unwrap();
        rows.iter_mut().find(|r| r["name"] == name).unwrap()
    }

    /// The entry of a tensor's part.
    fn part(&mut self, name: &str) -> &mut Tensor {
        self.data.iter_mut().find(|t| t.name == name).unwrap()
    }

    fn without(&mut self, tensor: &str, part: &str) {
        self.row(tensor)["parts"].as_object_mut().unwrap().remove(part).unwrap();
    }

    /// Replaces a part by fewer or more elements.
    fn resize(&mut self, part: &str, elements: usize) {
        let part = self.part(part);
        part.bytes.resize(elements * part.dtype.size(), 0);
        part.shape = vec![elements as u64];
    }

    fn set(&mut self, part: &str, i: usize, bits: u64) {
        self.part(part).set(i, bits);
    }
}

const CONFIG: &str = "vector_config.json";
const DATA: &str = "vector_model.safetensors";

/// Opens a vector folder and reads every element and correction of it (the first blocks of tensors that are too long to be true).
fn decode(folder: &Path) -> Result<(), Error> {
    let level = Level::current()?;
    let vector = VectorFolder::open(folder)?;
    let pool = Pool::default();
    for row in &vector.rows {
        let term = Term::new(1.0, Source::Stored(vector.tensor(&row.name)?));
        for block in 0..row.elements.div_ceil(BLOCK).min(4) {
            let range = block * BLOCK..((block + 1) * BLOCK).min(row.elements);
            let mut values = vec![0f64; (range.end - range.start) as usize];
            let mut reader = term.open::<f64>(range.clone(), &pool)?;
            reader.add(level, &mut values, range, true)?;
            reader.corrections(block, &mut Vec::new())?;
        }
    }
    Ok(())
}

/// Applies the spoiled vector to the negative donor, as anyone would who trusts it.
fn trust(family: &mut Family) -> Result<(), Error> {
    family.operands.truncate(3);
    family.operands.push(Operand::Vector(std::sync::Arc::new(VectorFolder::open(&family.path("v"))?)));
    let plan = apply_plan(&family.path("out"), family.checkpoint(2), 2, how(2, 16 << 20), |name| vec![stored(1.0, 3, name)]);
    apply(&plan, &family.operands).map(|_| ())
}

type Edit = fn(&mut Spoil);

/// What is spoiled, the tensor that the refusal names, and what it says.
const SPOILED: &[(&str, &str, &str, Edit)] = &[
    ("another format", "", "format 2", |s| s.config["format"] = 2.into()),
    ("a format that is text", "", "manifest", |s| s.config["format"] = "1".into()),
    ("no tensors", "", "tensors", |s| drop(s.config.as_object_mut().unwrap().remove("tensors"))),
    ("tensors that are none", "", "manifest", |s| s.config["tensors"] = json!([1])),
    ("an unknown digest", "", "md5", |s| s.config["digest"] = "md5".into()),
    ("a name twice", "codes", "twice", |s| {
        let row = s.row("codes").clone();
        s.config["tensors"].as_array_mut().unwrap().push(row);
    }),
    ("a shape of more", "codes", "elements", |s| s.row("codes")["shape"] = json!([7, 7])),
    ("elements of more", "every", "elements", |s| s.row("every")["elements"] = json!(1u64 << 40)),
    ("a shape that overflows", "every", "overflows", |s| s.row("every")["shape"] = json!([1u64 << 40, 1u64 << 40])),
    ("a shape whose bytes overflow", "none", "overflows", |s| {
        s.row("none")["shape"] = json!([1u64 << 62]);
        s.row("none")["elements"] = json!(1u64 << 62);
    }),
    ("a negative shape", "", "-1", |s| s.row("codes")["shape"] = json!([-1])),
    ("a dense tensor as long as can be", "every", "wide_starts", |s| {
        s.row("every")["shape"] = json!([1u64 << 60]);
        s.row("every")["elements"] = json!(1u64 << 60);
    }),
    ("a sparse tensor as long as can be", "codes", "bitmap", |s| {
        s.row("codes")["shape"] = json!([1u64 << 60]);
        s.row("codes")["elements"] = json!(1u64 << 60);
    }),
    ("an unknown format of elements", "codes", "F31", |s| s.row("codes")["dtype"] = "F31".into()),
    ("a difference of integers", "codes", "I32", |s| s.row("codes")["dtype"] = "I32".into()),
    ("an unknown encoding", "", "lowrank", |s| s.row("codes")["encoding"] = "lowrank".into()),
    ("a zero with parts", "codes", "zero", |s| s.row("codes")["encoding"] = "zero".into()),
    ("a zero that moved", "none", "zero", |s| s.row("none")["moved"] = 5.into()),
    ("another encoding than the parts'", "codes", "values", |s| s.row("codes")["encoding"] = "dense".into()),
    ("dense without values", "every", "values", |s| s.without("every", "values")),
    ("an entry that is not there", "codes", "nowhere", |s| s.row("codes")["parts"]["values"]["entry"] = "nowhere".into()),
    ("a padding that is not there", "codes", "nowhere", |s| s.row("codes")["parts"]["padding"] = json!({"entry": "nowhere", "digest": null})),
    ("an entry that is lost", "full", "full:bitmap", |s| s.data.retain(|t| t.name != "full:bitmap")),
    ("dense values of another shape", "every", "shape", |s| s.part("every").shape = vec![2, 240]),
    ("dense values of another format", "every", "BF16, F32 or F64", |s| {
        s.part("every").dtype = Dtype::I32;
    }),
    ("no bitmap", "codes", "bitmap", |s| s.without("codes", "bitmap")),
    ("no starts", "codes", "starts", |s| s.without("codes", "starts")),
    ("no values", "short", "values", |s| s.without("short", "values")),
    ("no palette", "codes", "palette", |s| s.without("codes", "palette")),
    ("no escapes", "short", "escapes", |s| s.without("short", "escapes")),
    ("a palette for values that have none", "short", "palette", |s| {
        s.row("short")["parts"]["palette"] = json!({"entry": "codes:palette", "digest": null});
    }),
    ("a short bitmap", "codes", "bitmap", |s| s.resize("codes:bitmap", 56)),
    ("a long bitmap", "codes", "bitmap", |s| s.resize("codes:bitmap", 72)),
    ("a bitmap of another format", "codes", "bitmap", |s| s.part("codes:bitmap").dtype = Dtype::I8),
    ("starts of another length", "codes", "starts", |s| s.resize("codes:starts", 6)),
    ("starts of another format", "codes", "starts", |s| s.part("codes:starts").dtype = Dtype::I64),
    ("starts that begin late", "codes", "starts", |s| s.set("codes:starts", 0, 1)),
    ("escapes that begin late", "codes", "starts", |s| s.set("codes:starts", 1, 1)),
    ("starts of more than moved", "codes", "starts", |s| {
        let moved = s.part("codes:starts").bit(2);
        s.set("codes:starts", 2, moved + 1);
    }),
    ("starts of more than there is", "codes", "starts", |s| {
        s.set("codes:starts", 2, 481);
        s.row("codes")["moved"] = 481.into();
    }),
    ("starts at the end of 64 bits", "codes", "starts", |s| {
        s.set("codes:starts", 2, u64::MAX);
        s.row("codes")["moved"] = u64::MAX.into();
    }),
    ("escapes of more than there is", "short", "starts", |s| s.set("short:starts", 3, 400)),
    ("escapes at the end of 64 bits", "short", "starts", |s| s.set("short:starts", 3, u64::MAX)),
    ("values that are too short", "codes", "starts", |s| s.resize("codes:values", 80)),
    ("a bit less", "codes", "set bits", |s| {
        let byte = s.part("codes:bitmap").bit(0);
        s.set("codes:bitmap", 0, byte & (byte - 1));
    }),
    ("a bit more", "full", "set bits", |s| {
        let byte = s.part("full:bitmap").bit(3);
        s.set("full:bitmap", 3, byte | 4);
    }),
    ("every bit", "short", "set bits", |s| (0..60).for_each(|i| s.set("short:bitmap", i, 0xFF))),
    ("no bit", "short", "set bits", |s| (0..64).for_each(|i| s.set("short:bitmap", i, 0))),
    ("a palette of too many", "codes", "palette", |s| s.resize("codes:palette", 258)),
    ("a palette of too few", "codes", "set bits", |s| s.resize("codes:palette", 0)),
    ("a palette of integers", "codes", "palette", |s| s.part("codes:palette").dtype = Dtype::I32),
    ("a code outside the palette", "codes", "set bits", |s| s.set("codes:values", 0, 200)),
    ("an escape too many", "codes", "set bits", |s| s.set("codes:values", 0, 255)),
    ("an escape too few", "codes", "set bits", |s| {
        let at = (0..100).find(|&i| s.part("codes:values").bit(i) == 255).unwrap();
        s.set("codes:values", at, 0);
    }),
    ("a short escape too many", "short", "set bits", |s| s.set("short:values", 0, 0x7FC0)),
    ("escapes of another format", "short", "escapes", |s| s.part("short:escapes").dtype = Dtype::I32),
    ("values of integers", "full", "values", |s| s.part("full:values").dtype = Dtype::I32),
    ("corrections without places", "full", "wide_at", |s| s.without("full", "wide_at")),
    ("corrections without starts", "every", "wide_starts", |s| s.without("every", "wide_starts")),
    ("corrections without numbers", "every", "wide_lo", |s| s.without("every", "wide_lo")),
    ("corrections of another format", "every", "F64", |s| s.part("every:wide_lo").dtype = Dtype::I64),
    ("corrections in more blocks", "every", "wide_starts", |s| s.resize("every:wide_starts", 3)),
    ("corrections that begin late", "every", "wide_starts", |s| s.set("every:wide_starts", 0, 1)),
    ("corrections that nobody counted", "full", "wide_starts", |s| s.row("full")["wide"] = 1.into()),
    ("corrections of more than there is", "full", "wide_starts", |s| {
        s.set("full:wide_starts", 1, 4000);
        s.row("full")["wide"] = 4000.into();
    }),
    ("corrections at the end of 64 bits", "full", "wide_starts", |s| {
        s.set("full:wide_starts", 1, u64::MAX);
        s.row("full")["wide"] = u64::MAX.into();
    }),
    ("a place outside its tensor", "full", "full:wide_at", |s| s.set("full:wide_at", 0, 480)),
    ("a place outside its block", "every", "every:wide_at", |s| s.set("every:wide_at", 1, u64::from(u32::MAX))),
    ("places that go back", "every", "every:wide_at", |s| s.set("every:wide_at", 1, 0)),
    ("a place twice", "full", "full:wide_at", |s| {
        let first = s.part("full:wide_at").bit(0);
        s.set("full:wide_at", 1, first);
    }),
    ("a correction that is no number", "full", "full:wide_lo", |s| s.set("full:wide_lo", 1, f64::NAN.to_bits())),
    ("a correction without end", "every", "every:wide_lo", |s| s.set("every:wide_lo", 1, f64::INFINITY.to_bits())),
    ("bytes that nobody has", "codes", "bytes", |s| {
        for name in ["codes", "short", "every"] {
            s.row(name)["bytes"] = u64::MAX.into();
        }
    }),
];

#[test]
fn every_lie_of_a_vector_is_refused_in_words() {
    let mut spoil = Spoil::new(480);
    let (config, data) = (spoil.config.clone(), spoil.data.clone());
    spoil.save();
    decode(&spoil.family.path("v")).unwrap();
    trust(&mut spoil.family).unwrap();
    let mut wrong = Vec::new();
    for (what, tensor, says, edit) in SPOILED {
        (spoil.config, spoil.data) = (config.clone(), data.clone());
        edit(&mut spoil);
        spoil.save();
        let folder = spoil.family.path("v");
        for outcome in [decode(&folder), trust(&mut spoil.family)] {
            match outcome {
                Err(Error::Format { path, problem })
                    if path.starts_with(&folder) && problem.contains(says) && problem.contains(tensor) => {}
                other => wrong.push(format!("{what}: {other:?}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn starts_that_lie_about_blocks_are_refused() {
    let n = BLOCK + 3000;
    let one = |moves: bool| {
        let step = move |i: u64| if moves && i % 1000 == 0 { 1.0078125 } else { 1.0 };
        Tensor::floats("w", Dtype::BF16, (0..n).map(step))
    };
    let mut family = Family::new(&[vec![one(true)]], &[vec![one(false)]], &[vec![one(false)]]);
    family.extract("sparse");
    let config = serde_json::from_str(&std::fs::read_to_string(family.path("v").join(CONFIG)).unwrap()).unwrap();
    let mut spoil = Spoil { family, config, data: Vec::new() };
    spoil.load();
    spoil.config["digest"] = "none".into();
    let data = spoil.data.clone();
    let cases: [(&str, u64, u64); 4] = [
        ("set bits", 262, 0),
        ("set bits", 264, 0),
        ("starts", 300, 0),
        ("starts", 263, 1),
    ];
    for (says, values, escapes) in cases {
        spoil.data = data.clone();
        spoil.set("w:starts", 2, values);
        spoil.set("w:starts", 3, escapes);
        spoil.save();
        for outcome in [decode(&spoil.family.path("v")), trust(&mut spoil.family)] {
            match outcome {
                Err(Error::Format { problem, .. }) => assert!(problem.contains(says) && problem.contains('w'), "{problem}"),
                other => panic!("{values} {escapes}: {other:?}"),
            }
        }
    }
}

#[test]
fn manifests_that_say_something_twice_are_refused() {
    let mut spoil = Spoil::new(480);
    spoil.save();
    let text = spoil.config.to_string();
    let palette = spoil.row("codes")["parts"]["palette"].to_string();
    let cases = [
        (text.replacen("\"palette\":", &format!("\"palette\":{palette},\"palette\":"), 1), "twice"),
        (text.replacen("\"shape\":", "\"shape\":[480],\"shape\":", 1), "duplicate field"),
        (text.replacen("\"format\":", "\"format\":1,\"format\":", 1), "duplicate field"),
        (text.replacen("\"entry\":", "\"entry\":\"codes\",\"entry\":", 1), "duplicate field"),
        (format!("{text}{{}}"), "manifest"),
        (format!("{{\"tensors\":{}", "[".repeat(100_000)), "manifest"),
        (String::new(), "manifest"),
    ];
    for (manifest, says) in cases {
        std::fs::write(spoil.family.path("v").join(CONFIG), &manifest).unwrap();
        match decode(&spoil.family.path("v")) {
            Err(Error::Format { path, problem }) => assert!(path.ends_with(CONFIG) && problem.contains(says), "{problem}"),
            other => panic!("{says}: {other:?}"),
        }
    }
    std::fs::write(spoil.family.path("v").join(CONFIG), b"{\"format\":1,\"\xFF\":0,\"tensors\":[]}").unwrap();
    assert!(matches!(decode(&spoil.family.path("v")), Err(Error::Format { .. })));
}

#[test]
fn what_a_reader_need_not_know_is_passed_over() {
    let mut spoil = Spoil::new(480);
    spoil.config["recipe"] = json!({"a": [1, 2]});
    spoil.row("codes")["note"] = json!(null);
    spoil.row("every")["parts"]["values"]["note"] = json!(1.5);
    spoil.save();
    decode(&spoil.family.path("v")).unwrap();
    trust(&mut spoil.family).unwrap();
}

#[test]
fn a_vector_without_its_data_is_refused() {
    let mut spoil = Spoil::new(480);
    std::fs::remove_file(spoil.family.path("v").join(DATA)).unwrap();
    match decode(&spoil.family.path("v")) {
        Err(Error::Format { path, problem }) => assert!(path.ends_with("v") && problem.contains(DATA), "{problem}"),
        other => panic!("{other:?}"),
    }
    spoil.data[0].dtype = Dtype::I8;
    spoil.save();
    let index = json!({"weight_map": {"codes:bitmap": "../p/model.safetensors"}}).to_string();
    std::fs::write(spoil.family.path("v").join("vector_model.safetensors.index.json"), index).unwrap();
    assert!(matches!(decode(&spoil.family.path("v")), Err(Error::Format { .. })));
    std::fs::remove_file(spoil.family.path("v").join(CONFIG)).unwrap();
    assert!(matches!(decode(&spoil.family.path("v")), Err(Error::Io { path, .. }) if path.ends_with(CONFIG)));
}

#[test]
fn zeros_without_end_take_no_memory_and_no_time() {
    let mut spoil = Spoil::new(480);
    let n = 1u64 << 60;
    spoil.row("none")["shape"] = json!([n]);
    spoil.row("none")["elements"] = json!(n);
    // Together they have more elements than 64 bits can count.
    for i in 0..20 {
        let mut row = spoil.row("none").clone();
        row["name"] = format!("none{i}").into();
        spoil.config["tensors"].as_array_mut().unwrap().push(row);
    }
    spoil.save();
    let folder = spoil.family.path("v");
    let sums = within_seconds((folder, n), |(folder, n)| {
        let operands = [Operand::Vector(common::vector(&folder))];
        let tensor = |i: u64| {
            let name = format!("none{i}");
            json!({"name": name, "elements": n, "quantities": [[stored(1.0, 0, &name)]]})
        };
        let what = json!({"tensors": (0..20).map(tensor).collect::<Vec<_>>()});
        reasonvec::inspect::measure(&plan(what, how(2, 16 << 20)), Operands(&operands), &Control::default())
    });
    assert_eq!(sums.unwrap()[0].moved, [0]);
}

fn harmless(outcome: Result<(), Error>) -> Result<(), TestCaseError> {
    match outcome {
        Ok(()) | Err(Error::Format { .. } | Error::NonFinite { .. }) => Ok(()),
        Err(other) => Err(TestCaseError::fail(format!("{other:?}"))),
    }
}

proptest! {
    #[test]
    fn changed_manifests_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(&b"0123456789-.eE\"{}[],:abnull "[..])), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let [config, data] = sample();
        let mut config = config.to_vec();
        for (at, byte) in changes {
            let at = at.index(config.len());
            config[at] = byte;
        }
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        std::fs::write(folder.path().join(DATA), data).unwrap();
        harmless(decode(folder.path()))?;
    }

    #[test]
    fn changed_numbers_never_panic(row in 0usize..5, field in prop::sample::select(&["elements", "moved", "wide", "inexact", "bytes", "shape", "max_at"][..]), number in prop_oneof![any::<u64>(), 0u64..2000]) {
        let folder = tempfile::tempdir().unwrap();
        let [config, data] = sample();
        let mut config: Value = serde_json::from_slice(config).unwrap();
        let row = &mut config["tensors"][row];
        row[field] = if field == "shape" { json!([number]) } else { json!(number) };
        if field == "shape" {
            row["elements"] = json!(number);
        }
        std::fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
        std::fs::write(folder.path().join(DATA), data).unwrap();
        harmless(decode(folder.path()))?;
    }

    #[test]
    fn changed_data_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let folder = tempfile::tempdir().unwrap();
        let [config, data] = sample();
        let mut data = data.to_vec();
        for (at, byte) in changes {
            let at = at.index(data.len());
            data[at] = byte;
        }
        std::fs::write(folder.path().join(CONFIG), config).unwrap();
        std::fs::write(folder.path().join(DATA), data).unwrap();
        harmless(decode(folder.path()))?;
    }
}

/// The files of a small vector, made once.
fn sample() -> [&'static [u8]; 2] {
    static FILES: std::sync::OnceLock<[Vec<u8>; 2]> = std::sync::OnceLock::new();
    let files = FILES.get_or_init(|| {
        let mut spoil = Spoil::new(480);
        spoil.save();
        [CONFIG, DATA].map(|name| std::fs::read(spoil.family.path("v").join(name)).unwrap())
    });
    [&files[0], &files[1]]
}
