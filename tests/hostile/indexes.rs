//! Indexes, and folders of shards.

use std::path::Path;

use proptest::prelude::*;
use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::store::Checkpoint;
use reasonvec::vector::VectorFolder;
use serde_json::json;

use crate::common::{Tensor, file, write_checkpoint, write_shard};
use crate::headers::nearly;
use crate::{refused, within_seconds};

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
        assert!(
            said.contains(INDEX) && said.contains("evil.weight") && said.contains("do not trust"),
            "{place}: {said}"
        );
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
        (
            r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}"#,
            "twice",
        ),
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
    for name in [
        "model-18446744073709551615-of-18446744073709551615.safetensors",
        "model-0-of-1.safetensors",
        "model-x-of-y.safetensors",
    ] {
        write_shard(&numbers.path().join(name), &[shard("a")]);
        assert!(Checkpoint::open(numbers.path()).is_err());
    }
    let missing = folder.path().join("nowhere");
    assert!(matches!(Checkpoint::open(&missing).unwrap_err(), Error::Io { path, .. } if path == missing));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_and_not_waited_for() {
    let fifo = |path: &Path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
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
