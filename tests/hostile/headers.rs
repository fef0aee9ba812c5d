//! Headers. The oracle is the `safetensors` crate: what we take it takes, and what it takes we take, but for a few rules of our own.

use proptest::prelude::*;
use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::store::Checkpoint;
use reasonvec::store::header::Header;
use serde_json::{Value, json};

use crate::common::file;
use crate::refused;

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
    let text = include_str!("../corpus/headers.json");
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
pub(crate) fn nearly() -> impl Strategy<Value = (String, usize)> {
    let dtype = prop::sample::select(
        &[
            "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64",
            "F8_E4M3", "F8_E5M2", "F8_E8M0",
        ][..],
    );
    let shape = prop::collection::vec(prop_oneof![6 => 0u64..5, 1 => Just(1)], 0..4);
    let name = prop_oneof![8 => "[a-z.0-9]{1,8}", 1 => any::<String>(), 1 => Just("__metadata__".to_owned())];
    let tensors = prop::collection::vec((name, dtype, shape), 0..6);
    let change = (0usize..12, any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u64>());
    let metadata = prop::option::of(prop::collection::vec((any::<String>(), any::<String>()), 0..3));
    (tensors, metadata, prop::collection::vec(change, 0..3), any::<bool>()).prop_map(
        |(tensors, metadata, changes, shuffle)| {
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
                items.push((
                    "__metadata__".into(),
                    Value::Object(pairs.into_iter().map(|(k, v)| (k, v.into())).collect()),
                ));
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
                    7 => {
                        items[i].1 =
                            [Value::Null, json!([]), json!("F32"), json!(number), json!({})][small as usize % 5].clone()
                    }
                    8 => items[i].0 = items[j].0.clone(),
                    9 => items[i].1["data_offsets"] = json!([-1, 1.5]),
                    10 => items[i].1["shape"] = json!(small),
                    _ => items.swap(i, j),
                }
            }
            let body: Vec<String> = items.iter().map(|(k, v)| format!("{}:{v}", Value::from(k.as_str()))).collect();
            (format!("{{{}}}", body.join(",")), data as usize)
        },
    )
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
                let range =
                    info.data_offsets.0 as u64 + header.data_start..info.data_offsets.1 as u64 + header.data_start;
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
