//! Factors that lie: of a low-rank tensor in a manifest, and of an adapter in a plan.

use std::sync::Arc;

use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::plan::{Operand, Operands, SourcePlan};
use reasonvec::store::Checkpoint;
use reasonvec::vector::VectorFolder;
use serde_json::{Value, json};

use crate::common::{Tensor, write_shard};

fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> Tensor {
    let n = shape.iter().product::<u64>() as usize;
    let bytes = match dtype {
        Dtype::F64 => (0..n).flat_map(|i| (1.0 + i as f64).to_le_bytes()).collect(),
        Dtype::F32 => (0..n).flat_map(|i| (0.5 + i as f32).to_le_bytes()).collect(),
        _ => vec![0; n * dtype.size()],
    };
    Tensor { name: name.into(), dtype, shape: shape.to_vec(), bytes }
}

/// A vector of one low-rank tensor of 6 x 4 and rank 2.
fn vector() -> (Value, Vec<Tensor>) {
    let data =
        vec![tensor("w:u", Dtype::F32, &[6, 2]), tensor("w:s", Dtype::F64, &[2]), tensor("w:v", Dtype::F32, &[2, 4])];
    let part = |role: &str| json!({"entry": format!("w:{role}"), "digest": null});
    let row = json!({
        "name": "w", "shape": [6, 4], "dtype": "BF16", "encoding": "lowrank", "elements": 24, "moved": 24, "norm": 1.0, "max": 1.0,
        "max_at": 0, "inexact": 0, "wide": 0, "rank": 2, "residual": 0.0, "bytes": 0,
        "parts": {"u": part("u"), "s": part("s"), "v": part("v")},
    });
    (json!({"format": 1, "digest": "none", "tensors": [row]}), data)
}

fn opened(mut config: Value, data: &[Tensor]) -> Result<VectorFolder, Error> {
    let folder = tempfile::tempdir().unwrap();
    config["tensors"][0]["bytes"] = data.iter().map(|t| t.bytes.len()).sum::<usize>().into();
    std::fs::write(folder.path().join("vector_config.json"), config.to_string()).unwrap();
    write_shard(&folder.path().join("vector_model.safetensors"), data);
    VectorFolder::open(folder.path())
}

type Spoil = fn(&mut Value, &mut Vec<Tensor>);

#[test]
fn factors_that_contradict_their_row_are_refused() {
    let (config, data) = vector();
    assert!(opened(config, &data).is_ok());
    let cases: [(&str, Spoil, &str); 14] = [
        ("another rank", |c, _| c["tensors"][0]["rank"] = 3.into(), "rank Some(3), s has 2"),
        (
            "no rank",
            |c, _| {
                c["tensors"][0].as_object_mut().unwrap().remove("rank");
            },
            "rank None",
        ),
        (
            "no s",
            |c, _| {
                c["tensors"][0]["parts"].as_object_mut().unwrap().remove("s");
            },
            "bytes",
        ),
        ("s of F32", |_, d| d[1] = tensor("w:s", Dtype::F32, &[2]), "expected s of 1 to 4 F64"),
        ("s of two dimensions", |_, d| d[1] = tensor("w:s", Dtype::F64, &[1, 2]), "expected s of 1 to 4 F64"),
        ("u of another rank", |_, d| d[0] = tensor("w:u", Dtype::F32, &[4, 3]), "have no product"),
        ("v of another rank", |_, d| d[2] = tensor("w:v", Dtype::F32, &[4, 2]), "have no product"),
        ("u of other rows", |_, d| d[0] = tensor("w:u", Dtype::F32, &[5, 2]), "the product of its factors [5, 4]"),
        ("u of one dimension", |_, d| d[0] = tensor("w:u", Dtype::F32, &[12]), "factors are matrices"),
        ("u of codes", |_, d| d[0] = tensor("w:u", Dtype::U8, &[6, 2]), "factors are floats"),
        ("s of NaN", |_, d| d[1].bytes[..8].copy_from_slice(&f64::NAN.to_le_bytes()), "s holds NaN"),
        ("a vector", |c, _| c["tensors"][0]["shape"] = json!([24]), "is no matrix"),
        ("second parts", |c, _| c["tensors"][0]["wide"] = 1.into(), "no second parts"),
        (
            "a shape that overflows",
            |c, _| {
                c["tensors"][0]["shape"] = json!([1u64 << 40, 1u64 << 40]);
            },
            "overflows",
        ),
    ];
    for (case, spoil, message) in cases {
        let (mut config, mut data) = vector();
        spoil(&mut config, &mut data);
        match opened(config, &data).err() {
            Some(Error::Format { problem, .. }) => {
                assert!(problem.contains(message) && problem.contains("\"w\""), "{case}: {problem}");
            }
            other => panic!("{case}: {other:?}"),
        }
    }
}

/// A vector of one stack of 3 matrices of 6 x 4, each of rank 2.
fn stack() -> (Value, Vec<Tensor>) {
    let (mut config, _) = vector();
    config["tensors"][0]["shape"] = json!([3, 6, 4]);
    config["tensors"][0]["elements"] = 72.into();
    let data = vec![
        tensor("w:u", Dtype::F32, &[3, 6, 2]),
        tensor("w:s", Dtype::F64, &[3, 2]),
        tensor("w:v", Dtype::F32, &[3, 2, 4]),
    ];
    (config, data)
}

#[test]
fn stacks_whose_factors_do_not_fit_are_refused() {
    let (config, data) = stack();
    assert!(opened(config, &data).is_ok());
    let cases: [(&str, Spoil, &str); 9] = [
        ("s of one matrix", |_, d| d[1] = tensor("w:s", Dtype::F64, &[2]), "for each of 3 matrices"),
        ("s of other matrices", |_, d| d[1] = tensor("w:s", Dtype::F64, &[4, 2]), "for each of 3 matrices"),
        ("u of one matrix", |_, d| d[0] = tensor("w:u", Dtype::F32, &[6, 2]), "make no stack"),
        ("u of other rows", |_, d| d[0] = tensor("w:u", Dtype::F32, &[3, 5, 2]), "make no stack"),
        ("v of another rank", |_, d| d[2] = tensor("w:v", Dtype::F32, &[3, 1, 4]), "make no stack"),
        ("v of other matrices", |_, d| d[2] = tensor("w:v", Dtype::F32, &[2, 2, 4]), "make no stack"),
        ("u of codes", |_, d| d[0] = tensor("w:u", Dtype::U8, &[3, 6, 2]), "factors are floats"),
        ("four dimensions", |c, _| c["tensors"][0]["shape"] = json!([3, 6, 2, 2]), "is no matrix"),
        ("another rank", |c, _| c["tensors"][0]["rank"] = 6.into(), "rank Some(6), s has 2"),
    ];
    for (case, spoil, message) in cases {
        let (mut config, mut data) = stack();
        spoil(&mut config, &mut data);
        match opened(config, &data).err() {
            Some(Error::Format { problem, .. }) => {
                assert!(problem.contains(message) && problem.contains("\"w\""), "{case}: {problem}");
            }
            other => panic!("{case}: {other:?}"),
        }
    }
}

#[test]
fn a_rank_above_the_sides_is_refused() {
    let (mut config, mut data) = vector();
    data[0] = tensor("w:u", Dtype::F32, &[6, 5]);
    data[1] = tensor("w:s", Dtype::F64, &[5]);
    data[2] = tensor("w:v", Dtype::F32, &[5, 4]);
    config["tensors"][0]["rank"] = 5.into();
    assert!(opened(config, &data).unwrap_err().to_string().contains("expected s of 1 to 4 F64"));
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let data = [
        tensor("a", Dtype::F32, &[2, 4]),
        tensor("b", Dtype::F32, &[6, 2]),
        tensor("long", Dtype::F32, &[5000, 1]),
        tensor("wide", Dtype::F32, &[1, 5000]),
        tensor("none", Dtype::F32, &[0, 4]),
        tensor("empty", Dtype::F32, &[6, 0]),
        tensor("bias", Dtype::F32, &[6]),
        tensor("codes", Dtype::I32, &[6, 2]),
        tensor("w", Dtype::F32, &[6, 4]),
    ];
    write_shard(&path, &data);
    let operands = [Operand::Checkpoint(Arc::new(Checkpoint::open(&path).unwrap()))];
    let source = |plan: Value| Operands(&operands).source(&serde_json::from_value::<SourcePlan>(plan).unwrap());
    let of = |name: &str| json!({"operand": 0, "name": name});
    let product = |a: &str, b: &str, rows: u64, columns: u64| json!({"product": {"a": of(a), "b": of(b), "scale": 1.0, "rows": rows, "columns": columns}});
    assert!(source(product("a", "b", 6, 4)).is_ok());
    assert!(
        source(
            json!({"product": {"a": of("a"), "b": of("b"), "scale": 1.0, "rows": 4, "columns": 6, "transposed": true}})
        )
        .is_ok()
    );
    assert!(source(json!({"product": {"a": null, "b": of("bias"), "scale": 1.0, "rows": 6, "columns": 1}})).is_ok());
    let refused = [
        (product("a", "b", 4, 6), "the product of its factors [6, 4]"),
        (product("b", "a", 2, 2), "have no product"),
        (product("none", "empty", 6, 4), "have no product"),
        (product("long", "wide", 1, 1), "a rank of 5000 is not credible"),
        (product("bias", "b", 6, 4), "factors are matrices"),
        (product("a", "codes", 6, 4), "I32"),
        (product("a", "gone", 6, 4), "gone"),
        (product("a", "b", u64::MAX, u64::MAX), "the product of its factors"),
        (
            json!({"product": {"a": null, "b": of("bias"), "scale": 1.0, "rows": 1u64 << 40, "columns": 1u64 << 40}}),
            "has 6 elements",
        ),
        (json!({"product": {"a": null, "b": of("bias"), "scale": 1.0, "rows": 7, "columns": 1}}), "has 6 elements"),
        (
            json!({"adapted": {"tensor": of("w"), "adapters": [{"a": of("b"), "b": of("a"), "scale": 1.0}]}}),
            "have no product",
        ),
    ];
    for (plan, message) in refused {
        let error = source(plan.clone()).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{plan}: {error:?}");
        assert!(error.to_string().contains(message), "{plan}: {error}");
    }
}
