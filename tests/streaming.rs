//! What a run may depend on, and what it leaves behind when it fails: one digest however it is run, resumed or laid out;
//! one clear error, and no file under a final name before it is whole.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{
    Dice, Family, Tensor, apply, apply_plan, at, checkpoint, contents, difference, extract, extract_plan, files, how,
    narrow, stored, vector, widen, write_checkpoint,
};
use proptest::prelude::*;
use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::merge::{self, Done};
use reasonvec::plan::{Operand, Operands};
use reasonvec::simd::Level;
use reasonvec::simd::level::VARIABLE as SIMD;
use reasonvec::store::header::Entry;
use reasonvec::store::{Algorithm, Checkpoint};
use reasonvec::stream::{BLOCK, Control, Grid, Turn, pass};
use serde_json::json;

/// The variable that chooses between mapped and read windows.
const IO: &str = "REASONVEC_IO";
/// Where a child process finds the family and leaves its outcome.
const FOLDER: &str = "REASONVEC_TEST_FOLDER";
const MIB: u64 = 1 << 20;

/// A donor (moved or not) or a target, with one tensor for every way through the code.
fn member(seed: u64, moved: bool) -> Vec<Tensor> {
    // A donor's twin has the same dice, so that only what is moved below differs.
    let mut dice = Dice::new(seed);
    let mut weights = |name: &str, dtype: Dtype, n: u64| {
        Tensor::floats(name, dtype, (0..n).map(|_| dice.weight()).collect::<Vec<_>>())
    };
    let mut tensors = vec![
        weights("rare", Dtype::BF16, BLOCK + 5000),
        weights("dense", Dtype::F32, 9001),
        weights("half", Dtype::F16, 3001),
        weights("double", Dtype::F64, 900),
        weights("still", Dtype::BF16, 4097),
        weights("scalar", Dtype::F32, 1).shaped(&[]),
        Tensor::bits("empty", Dtype::BF16, []).shaped(&[0, 8]),
        Tensor::bits("steps", Dtype::I64, (0..7).map(|i| i * i)),
    ];
    if moved {
        let mut dice = Dice::new(seed + 1);
        for tensor in &mut tensors {
            let every = match tensor.name.as_str() {
                "rare" => 8,
                "dense" | "double" => 1,
                "half" | "scalar" => 3,
                _ => continue,
            };
            for i in (0..tensor.len()).filter(|i| i % every == 0) {
                let x = widen(tensor.dtype, tensor.bit(i));
                // A step or two in the last place of bf16, as reinforcement learning makes them; now and then all but nothing is left.
                let x = if i % 40_000 == 16 { x * 1e-12 } else { x * (1.0 + dice.below(3) as f64 / 128.0) };
                tensor.set(i, narrow(tensor.dtype, x));
            }
        }
    }
    tensors
}

/// The same tensors in three shards and another order.
fn scattered(tensors: Vec<Tensor>) -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new(), Vec::new(), Vec::new()];
    for (i, tensor) in tensors.into_iter().rev().enumerate() {
        shards[i * 2 % 3].push(tensor);
    }
    shards
}

/// What must be the same: every tensor's digest, its inputs' digests, and its rounding report to the last bit.
fn digests(done: &[Done]) -> BTreeMap<String, String> {
    let line = |d: &Done| {
        let inputs: Vec<_> = d.inputs.iter().map(|(_, _, h)| h).collect();
        let r = d.rounding().map(|r| ([r.intended, r.realised, r.dot].map(f64::to_bits), r.updated, r.lost));
        (d.name.clone(), format!("{:?} {inputs:?} {r:?}", d.digest))
    };
    done.iter().map(line).collect()
}

/// Everything that a process with these variables makes of the family in a folder, by names that do not say how.
fn outcomes(folder: &Path) -> BTreeMap<String, String> {
    let operand = |name: &str| Operand::Checkpoint(checkpoint(&folder.join(name)));
    let whole = [operand("p"), operand("n"), operand("t")];
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut note = |what: String, value: String, run: &str| {
        let before = seen.entry(what.clone()).or_insert_with(|| value.clone());
        assert_eq!(*before, value, "{what} depends on {run}");
    };
    let out = folder.join(format!("out-{}", std::process::id()));
    let remove = |path: &Path| std::fs::remove_dir_all(path).unwrap();
    for threads in [1, 2, 8] {
        for budget in [MIB, 16 * MIB, 64 * MIB, 1024 * MIB] {
            let run = format!("{threads} threads, {} MiB", budget / MIB);
            let Operand::Checkpoint(target) = &whole[2] else { unreachable!() };
            let plan = apply_plan(&out, target, 2, how(threads, budget), |name| vec![difference(0.8, 0, 1, name)]);
            for (name, line) in digests(&apply(&plan, &whole).unwrap()) {
                note(format!("apply {name}"), line, &run);
            }
            note("apply's file".into(), file_digest(&out.join("model.safetensors")), &run);
            remove(&out);
            // The extraction says the same with fewer tries: its tiles are the same tiles.
            if (threads, budget) == (2, MIB)
                || (threads, budget) == (8, 1024 * MIB)
                || (threads, budget) == (1, 16 * MIB)
            {
                let Operand::Checkpoint(positive) = &whole[0] else { unreachable!() };
                let plan = extract_plan(&out, positive, "auto", how(threads, budget));
                let rows = extract(&plan, &whole).unwrap();
                note("extract's rows".into(), serde_json::to_string(&rows).unwrap(), &run);
                note("extract's file".into(), file_digest(&out.join("vector_model.safetensors")), &run);
                let with = [whole[2].clone(), Operand::Vector(vector(&out))];
                let through = folder.join(format!("through-{}", std::process::id()));
                let plan = apply_plan(&through, target, 0, how(threads, budget), |name| vec![stored(0.8, 1, name)]);
                apply(&plan, &with).unwrap();
                note("the stored vector's file".into(), file_digest(&through.join("model.safetensors")), &run);
                // An open file keeps its folder alive on some systems.
                drop(with);
                remove(&through);
                remove(&out);
            }
        }
    }
    let shards = [operand("p3"), operand("n3"), operand("t3")];
    for (donors, target) in [(&whole, &shards), (&shards, &whole), (&shards, &shards)] {
        let operands = [donors[0].clone(), donors[1].clone(), target[2].clone()];
        let Operand::Checkpoint(t) = &operands[2] else { unreachable!() };
        let plan = apply_plan(&out, t, 2, how(2, 16 * MIB), |name| vec![difference(0.8, 0, 1, name)]);
        for (name, line) in digests(&apply(&plan, &operands).unwrap()) {
            note(format!("apply {name}"), line, "shards");
        }
        remove(&out);
    }
    seen
}

fn file_digest(path: &Path) -> String {
    Algorithm::Blake3.digest_bytes(&std::fs::read(path).unwrap(), 1).unwrap()
}

/// Not a test of its own: the body of a child process, whose variables are its own too.
#[test]
#[ignore = "run by one_digest_however_it_is_run"]
fn child() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = Path::new(&folder);
        let seen = serde_json::to_string(&outcomes(folder)).unwrap();
        std::fs::write(folder.join(format!("{}.json", std::process::id())), seen).unwrap();
    }
}

#[test]
fn one_digest_however_it_is_run() {
    let folder = tempfile::tempdir().unwrap();
    for (name, seed, moved) in [("p", 1, true), ("n", 1, false), ("t", 5, false)] {
        let mut tensors = member(seed, moved);
        if name == "t" {
            tensors.retain(|t| t.name != "steps");
            tensors.extend(member(1, false).into_iter().filter(|t| t.name == "steps"));
        }
        write_checkpoint(&folder.path().join(name), std::slice::from_ref(&tensors));
        write_checkpoint(&folder.path().join(format!("{name}3")), &scattered(tensors));
    }
    let mut children = Vec::new();
    for level in Level::available() {
        for io in ["map", "read"] {
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["child", "--exact", "--ignored", "--test-threads=1"])
                .env(SIMD, level.name())
                .env(IO, io)
                .env(FOLDER, folder.path())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            children.push((format!("{} {io}", level.name()), child));
        }
    }
    let mut first: Option<BTreeMap<String, String>> = None;
    for (run, child) in children {
        let id = child.id();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{run}: {}", String::from_utf8_lossy(&output.stdout));
        let seen = std::fs::read_to_string(folder.path().join(format!("{id}.json"))).unwrap();
        let seen: BTreeMap<String, String> = serde_json::from_str(&seen).unwrap();
        assert_eq!(seen.len(), 8 + 1 + 3);
        let first = first.get_or_insert_with(|| seen.clone());
        assert_eq!(*first, seen, "{run}");
    }
}

#[test]
fn an_unknown_level_is_refused_by_name() {
    let error = Level::named("avx1024").unwrap_err().to_string();
    assert!(error.contains("avx1024") && error.contains("portable"), "{error}");
}

/// Donors, target, and the tensors `a` to `z`, each of a block and a bit.
fn long_family() -> Family {
    let names: Vec<String> = ('a'..='l').map(String::from).collect();
    let member = |seed: u64| -> Vec<Vec<Tensor>> {
        let mut dice = Dice::new(seed);
        let n = 40_000;
        let tensor = |name: &String| {
            let start = dice.next();
            Tensor::bits(name, Dtype::BF16, (0..n).map(move |i| 0x3C00 | start.wrapping_mul(2 * i + 1) >> 57))
        };
        let tensors: Vec<Tensor> = names.iter().map(tensor).collect();
        vec![tensors[..6].to_vec(), tensors[6..].to_vec()]
    };
    Family::new(&member(1), &member(2), &member(3))
}

fn long_plan(family: &Family, out: &str, resume: bool) -> merge::ApplyPlan {
    let mut plan =
        apply_plan(&family.path(out), family.checkpoint(2), 2, how(2, MIB), |name| vec![difference(0.5, 0, 1, name)]);
    plan.settings.resume = resume;
    plan
}

/// Runs a plan and cancels it as soon as its journal names some tensors. A run that is faster than the cancelling is set back to
/// what a kill at that moment would have left.
fn interrupt(plan: &merge::ApplyPlan, operands: &[Operand], tensors: usize) {
    let control = Control::default();
    let journal = plan.out.join(JOURNAL);
    let finished = AtomicBool::new(false);
    let result = std::thread::scope(|s| {
        s.spawn(|| {
            while !finished.load(Ordering::Relaxed) {
                if done_lines(&std::fs::read(&journal).unwrap_or_default()) >= tensors {
                    return control.cancel();
                }
                std::thread::yield_now();
            }
        });
        let result = merge::apply(plan, Operands(operands), &control);
        finished.store(true, Ordering::Relaxed);
        result
    });
    match result {
        Err(Error::Cancelled) => {}
        Ok(_) => set_back(&plan.out, tensors),
        Err(other) => panic!("{other}"),
    }
}

const JOURNAL: &str = ".reasonvec-journal";

fn done_lines(journal: &[u8]) -> usize {
    String::from_utf8_lossy(journal).matches("\"digest\"").count()
}

/// Makes a finished run one that was killed: the journal ends after some tensors, and the files of the others are not whole.
fn set_back(out: &Path, tensors: usize) {
    let text = std::fs::read(out.join(JOURNAL)).unwrap();
    let mut kept = Vec::new();
    for line in text.split_inclusive(|&b| b == b'\n') {
        if done_lines(&kept) + done_lines(line) <= tensors {
            kept.extend(line);
        }
    }
    std::fs::write(out.join(JOURNAL), &kept).unwrap();
    let kept = String::from_utf8_lossy(&kept).into_owned();
    for shard in Checkpoint::open(out).unwrap().shards() {
        let file = shard.map.path();
        let mut bytes = std::fs::read(file).unwrap();
        let lost = |e: &&Entry| !kept.contains(&format!("\"name\":{:?}", e.name));
        let lost: Vec<&Entry> = shard.header.entries.iter().filter(lost).collect();
        if !lost.is_empty() {
            lost.iter().for_each(|e| bytes[e.begin as usize..e.end as usize].fill(0xA5));
            std::fs::write(format!("{}.partial", file.display()), bytes).unwrap();
            std::fs::remove_file(file).unwrap();
        }
    }
}

/// Every file under a final name is the file of the whole run.
fn nothing_half_made(out: &Path, whole: &Path) {
    for file in files(out) {
        let name = file.file_name().unwrap().to_str().unwrap();
        if name.ends_with(".safetensors") {
            assert!(std::fs::read(&file).unwrap() == std::fs::read(whole.join(name)).unwrap(), "{name}");
        } else {
            assert!(name.ends_with(".partial") || name == JOURNAL, "{name}");
        }
    }
}

/// Bytes that a run says it will read and write.
fn expected_bytes(plan: &merge::ApplyPlan, operands: &[Operand]) -> (Vec<Done>, u64) {
    let control = Control::default();
    let done = merge::apply(plan, Operands(operands), &control).unwrap();
    (done, control.progress().1)
}

#[test]
fn a_cancelled_run_leaves_no_final_name_and_resumes_to_the_same_bytes() {
    let family = long_family();
    let (whole, everything) = expected_bytes(&long_plan(&family, "whole", false), &family.operands);
    for stop in 0..12 {
        let out = format!("out{stop}");
        interrupt(&long_plan(&family, &out, false), &family.operands, stop);
        nothing_half_made(&family.path(&out), &family.path("whole"));
        let (done, bytes) = expected_bytes(&long_plan(&family, &out, true), &family.operands);
        assert_eq!(digests(&done), digests(&whole), "stopped after {stop}");
        // One twelfth is read, read and written for each tensor; what is done is read back once.
        assert!(bytes <= everything - stop as u64 * (everything / 12) * 3 / 4, "{bytes} of {everything} after {stop}");
        assert_eq!(contents(&family.path(&out)), contents(&family.path("whole")));
    }
}

#[test]
fn a_run_that_is_resumed_twice_forgets_nothing() {
    let family = long_family();
    let (_, everything) = expected_bytes(&long_plan(&family, "whole", false), &family.operands);
    interrupt(&long_plan(&family, "out", false), &family.operands, 2);
    // What a kill in the middle of a line leaves, in the middle of a letter too.
    let journal = family.path("out").join(JOURNAL);
    let mut text = std::fs::read(&journal).unwrap();
    text.extend(b"{\"name\":\"\xC3");
    std::fs::write(&journal, text).unwrap();
    interrupt(&long_plan(&family, "out", true), &family.operands, 8);
    let (_, bytes) = expected_bytes(&long_plan(&family, "out", true), &family.operands);
    assert!(bytes <= everything * 6 / 12, "{bytes} of {everything} although 8 of 12 were done");
    assert_eq!(contents(&family.path("out")), contents(&family.path("whole")));
}

#[test]
fn what_was_damaged_between_two_runs_is_made_again() {
    let family = long_family();
    let (whole, _) = expected_bytes(&long_plan(&family, "whole", false), &family.operands);
    for tensors in [3, 8] {
        let out = format!("out{tensors}");
        interrupt(&long_plan(&family, &out, false), &family.operands, tensors);
        for file in files(&family.path(&out)) {
            if file.to_string_lossy().contains(".safetensors") {
                let mut bytes = std::fs::read(&file).unwrap();
                let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                for tensor in 0..6 {
                    bytes[header + tensor * 80_000 + 4321 * tensor] ^= 0x10;
                }
                std::fs::write(&file, bytes).unwrap();
            }
        }
        let (done, _) = expected_bytes(&long_plan(&family, &out, true), &family.operands);
        assert_eq!(digests(&done), digests(&whole));
        assert_eq!(contents(&family.path(&out)), contents(&family.path("whole")));
    }
}

#[test]
fn a_lost_partial_file_is_made_again() {
    let family = long_family();
    interrupt(&long_plan(&family, "out", false), &family.operands, 3);
    for file in files(&family.path("out")) {
        if file.extension().is_some_and(|e| e == "partial") {
            std::fs::remove_file(file).unwrap();
        }
    }
    apply(&long_plan(&family, "out", true), &family.operands).unwrap();
    apply(&long_plan(&family, "whole", false), &family.operands).unwrap();
    assert_eq!(contents(&family.path("out")), contents(&family.path("whole")));
}

#[test]
fn another_recipe_or_a_changed_input_is_not_resumed() {
    let mut family = long_family();
    interrupt(&long_plan(&family, "out", false), &family.operands, 2);
    let mut other = long_plan(&family, "out", true);
    other.shards[0].tensors[0].terms[0].coefficient = 0.25;
    let refusal = apply(&other, &family.operands).unwrap_err();
    assert!(matches!(refusal, Error::Usage(_)) && refusal.to_string().contains("--overwrite"), "{refusal}");

    // One bit of one donor, the length as before.
    let shard =
        files(&family.path("p")).into_iter().find(|f| f.extension().is_some_and(|e| e == "safetensors")).unwrap();
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    family.operands[0] = Operand::Checkpoint(checkpoint(&family.path("p")));
    let refusal = apply(&long_plan(&family, "out", true), &family.operands).unwrap_err();
    assert!(matches!(refusal, Error::Usage(_)) && refusal.to_string().contains("--overwrite"), "{refusal}");
    nothing_half_made(&family.path("out"), &family.path("out"));
}

#[test]
fn a_cancelled_extraction_leaves_nothing() {
    let family = long_family();
    let control = Control::default();
    control.cancel();
    let plan = extract_plan(&family.path("v"), family.checkpoint(0), "auto", how(2, MIB));
    let error = reasonvec::vector::extract(&plan, Operands(&family.operands), &control).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    assert_eq!(files(&family.path("v")), Vec::<std::path::PathBuf>::new());
    extract(&plan, &family.operands).unwrap();
    vector(&family.path("v"));
}

/// Donors and target of `n` ones each; `edit` spoils them.
fn spoiled(n: u64, dtype: Dtype, edit: impl FnOnce(&mut [Tensor; 3])) -> Family {
    let one = Tensor::floats("w", dtype, (0..n).map(|_| 1.0));
    let mut three = [one.clone(), one.clone(), one];
    edit(&mut three);
    let [p, n, t] = three;
    Family::one(&p, &n, &t)
}

fn fails(family: &Family, threads: usize, coefficient: f64) -> Error {
    let terms = |name: &str| vec![difference(coefficient, 0, 1, name)];
    let plan = apply_plan(&family.path("out"), family.checkpoint(2), 2, how(threads, 16 * MIB), terms);
    let error = apply(&plan, &family.operands).unwrap_err();
    nothing_half_made(&family.path("out"), &family.path("t"));
    assert!(!family.path("out").join("model.safetensors").exists());
    error
}

#[test]
fn numbers_that_are_none_are_named_by_file_tensor_and_place() {
    let n = BLOCK + 10_000;
    let first = BLOCK as usize + 4097;
    for (member, folder) in ["p", "n", "t"].into_iter().enumerate() {
        for (bits, value) in [(0x7FC1, "NaN"), (0x7F80, "inf"), (0xFF80, "-inf")] {
            let family = spoiled(n, Dtype::BF16, |three| {
                three[member].set(first, bits);
                three[member].set(first + 1, 0x7FC0);
                three[member].set(n as usize - 1, 0x7FC0);
            });
            let name = |error: Error| match error {
                Error::NonFinite { path, tensor, index, value, .. } => (path, tensor, index, value),
                other => panic!("{other}"),
            };
            let expected =
                (family.path(folder).join("model.safetensors"), "w".to_owned(), first as u64, value.to_owned());
            assert_eq!(name(fails(&family, 2, 1.0)), expected);
            if folder != "t" {
                let plan = extract_plan(&family.path("v"), family.checkpoint(0), "auto", how(2, 16 * MIB));
                assert_eq!(name(extract(&plan, &family.operands).unwrap_err()), expected);
                assert_eq!(files(&family.path("v")), Vec::<std::path::PathBuf>::new());
            }
        }
    }
}

#[test]
fn nan_passes_when_it_may_and_comes_out_canonical() {
    let family = spoiled(5000, Dtype::BF16, |[p, _, t]| {
        p.set(10, 0xFFA5);
        t.set(11, 0x7FA5);
    });
    let mut plan =
        apply_plan(&family.path("out"), family.checkpoint(2), 2, how(2, MIB), |name| vec![difference(1.0, 0, 1, name)]);
    plan.allow_nonfinite = true;
    apply(&plan, &family.operands).unwrap();
    let out = &contents(&family.path("out"))["w"];
    // Where nothing is added, the target's own bits stay.
    assert_eq!([10, 11, 12].map(|i| common::element(Dtype::BF16, out, i)), [0x7FC0, 0x7FA5, 0x3F80]);
}

#[test]
fn a_sum_that_does_not_fit_is_an_error() {
    let family = spoiled(5000, Dtype::F16, |[p, _, t]| {
        p.set(4500, 0x7BFF);
        t.set(4500, 0x7BFF);
    });
    match fails(&family, 2, 1.0) {
        Error::NonFinite { tensor, index, value, advice, .. } => {
            assert_eq!((tensor.as_str(), index), ("w", 4500));
            assert!(value.starts_with("131007"), "{value}");
            assert!(advice.contains("--out-dtype"), "{advice}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_number_that_does_not_fit_a_smaller_format_is_an_error_too() {
    let family = spoiled(5000, Dtype::F32, |[.., t]| t.set(4097, narrow(Dtype::F32, 70_000.0)));
    let mut plan = apply_plan(&family.path("out"), family.checkpoint(2), 2, how(1, MIB), |_| Vec::new());
    plan.shards[0].header_of = None;
    plan.shards[0].tensors[0].dtype = "F16".into();
    match apply(&plan, &family.operands).unwrap_err() {
        Error::NonFinite { path, tensor, index, .. } => {
            assert_eq!((path, tensor.as_str(), index), (family.path("t").join("model.safetensors"), "w", 4097));
        }
        other => panic!("{other}"),
    }
    plan.shards[0].tensors[0].dtype = "BF16".into();
    plan.settings.resume = false;
    apply(&plan, &family.operands).unwrap();
    let out = &contents(&family.path("out"))["w"];
    assert_eq!([0, 4097].map(|i| widen(Dtype::BF16, common::element(Dtype::BF16, out, i))), [1.0, 70_144.0]);
}

#[test]
fn integers_pass_only_if_they_are_equal() {
    let steps = |at: u64| vec![Tensor::bits("steps", Dtype::I32, (0..5000).map(|i| i + u64::from(i == at)))];
    let run = |family: &Family, out: &str| {
        let mut plan = apply_plan(&family.path(out), family.checkpoint(2), 2, how(1, MIB), |_| Vec::new());
        plan.shards[0].tensors[0].equal = serde_json::from_value(json!([at(0, "steps"), at(1, "steps")])).unwrap();
        apply(&plan, &family.operands)
    };
    let family = Family::single(&steps(9999), &steps(9999), &steps(9999));
    run(&family, "out").unwrap();
    assert!(contents(&family.path("out"))["steps"] == steps(9999)[0].bytes);
    let plan = extract_plan(&family.path("v"), family.checkpoint(0), "auto", how(1, MIB));
    assert!(extract(&plan, &family.operands).unwrap()[0].parts.is_empty());

    let family = Family::single(&steps(9999), &steps(4321), &steps(9999));
    let error = run(&family, "out").unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Mismatch { .. }), "{text}");
    assert!(text.contains("steps") && text.contains("4321") && text.contains("model.safetensors"), "{text}");
    assert!(!family.path("out").join("model.safetensors").exists());
    let plan = extract_plan(&family.path("v"), family.checkpoint(0), "auto", how(1, MIB));
    let text = extract(&plan, &family.operands).unwrap_err().to_string();
    assert!(text.contains("steps") && text.contains("4321"), "{text}");
    assert_eq!(files(&family.path("v")), Vec::<std::path::PathBuf>::new());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let make = |dtype: Dtype, n: u64| vec![Tensor::bits("w", dtype, (0..n).map(|_| 0))];
    let cases = [
        (Dtype::BF16, 6, Dtype::BF16, 5, "shapes differ"),
        (Dtype::I32, 5, Dtype::I32, 5, "integers"),
        (Dtype::F8E4M3, 5, Dtype::F8E4M3, 5, "dequantise"),
        (Dtype::BF16, 6, Dtype::BF16, 6, "6 elements"),
    ];
    for (p_dtype, p, n_dtype, n, says) in cases {
        let family = Family::single(&make(p_dtype, p), &make(n_dtype, n), &make(Dtype::BF16, 5));
        let plan = apply_plan(&family.path("out"), family.checkpoint(2), 2, how(1, MIB), |name| {
            vec![difference(1.0, 0, 1, name)]
        });
        let error = apply(&plan, &family.operands).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains('w') && error.to_string().contains(says), "{error}");
        assert_eq!(files(&family.path("out")), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn a_name_twice_is_refused_before_anything_is_written() {
    let family = long_family();
    let refused = |error: Error, folder: &str, says: &str| {
        assert!(matches!(error, Error::Mismatch { .. }) && error.to_string().contains(says), "{error}");
        assert_eq!(files(&family.path(folder)), Vec::<std::path::PathBuf>::new());
    };
    // In one file, and in two.
    for (shard, from) in [(0, 0), (1, 0)] {
        let mut plan = long_plan(&family, "out", false);
        let again = plan.shards[from].tensors[3].clone();
        plan.shards.iter_mut().for_each(|s| s.header_of = None);
        plan.shards[shard].tensors.push(again);
        refused(merge::predict(&plan, Operands(&family.operands)).unwrap_err(), "out", "d: the plan makes it twice");
        refused(apply(&plan, &family.operands).unwrap_err(), "out", "d: the plan makes it twice");
    }
    let mut plan = long_plan(&family, "out", false);
    plan.shards[1].file = plan.shards[0].file.clone();
    refused(apply(&plan, &family.operands).unwrap_err(), "out", "00001-of-00002.safetensors: the plan makes it twice");
    let mut plan = extract_plan(&family.path("v"), family.checkpoint(0), "auto", how(1, MIB));
    plan.tensors.push(plan.tensors[2].clone());
    refused(extract(&plan, &family.operands).unwrap_err(), "v", "c: the plan makes it twice");
}

#[test]
fn a_shape_that_overflows_is_refused_in_a_plan_too() {
    let family = spoiled(4, Dtype::BF16, |_| {});
    for shape in [[1u64 << 40, 1 << 40], [u64::MAX, 2], [1 << 62, 1]] {
        let mut plan = apply_plan(&family.path("out"), family.checkpoint(2), 2, how(1, MIB), |_| Vec::new());
        plan.shards[0].header_of = None;
        plan.shards[0].tensors[0].shape = shape.to_vec();
        let error = apply(&plan, &family.operands).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        let mut plan = extract_plan(&family.path("v"), family.checkpoint(0), "auto", how(1, MIB));
        plan.tensors[0].shape = shape.to_vec();
        let error = extract(&plan, &family.operands).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    }
}

#[test]
fn an_input_that_shrinks_is_an_error_with_its_name() {
    let family = spoiled(BLOCK, Dtype::BF16, |[p, ..]| p.set(0, 0));
    let donor = family.path("p").join("model.safetensors");
    std::fs::OpenOptions::new().write(true).open(&donor).unwrap().set_len(8192).unwrap();
    match fails(&family, 2, 1.0) {
        Error::Io { path, source, .. } => {
            assert_eq!(path, donor);
            assert!(source.to_string().contains("8192"), "{source}");
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_vector_whose_bytes_have_changed_is_not_applied() {
    let mut family = spoiled(5000, Dtype::BF16, |[p, ..]| (0..5000).for_each(|i| p.set(i, 0x3F80 + i as u64 % 7)));
    family.extract("auto");
    let file = family.path("v").join("vector_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() * 3 / 4;
    bytes[middle] ^= 0x40;
    std::fs::write(&file, bytes).unwrap();
    family.operands[3] = Operand::Vector(vector(&family.path("v")));
    let plan = apply_plan(&family.path("out"), family.checkpoint(2), 2, how(1, MIB), |name| vec![stored(1.0, 3, name)]);
    let error = apply(&plan, &family.operands).unwrap_err();
    assert!(matches!(error, Error::Damage { .. }), "{error}");
    assert!(error.to_string().contains("vector_model.safetensors") && error.to_string().contains('w'), "{error}");
    assert_eq!(files(&family.path("out")), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_late_error_is_reported_and_not_the_cancelling_that_it_caused() {
    // Through the public door: the last tile of the last tensor is bad, and seven workers wait for their turns.
    let n = BLOCK * 3 + 17;
    let family = spoiled(n, Dtype::BF16, |[p, ..]| {
        (0..64).for_each(|i| p.set(i * 1000, 0x3F81));
        p.set(n as usize - 1, 0x7FC0);
    });
    for _ in 0..4 {
        let plan = extract_plan(&family.path("v"), family.checkpoint(0), "sparse", how(8, 16 * MIB));
        match extract(&plan, &family.operands).unwrap_err() {
            Error::NonFinite { index, .. } => assert_eq!(index, n - 1),
            other => panic!("{other}"),
        }
    }
}

/// A pass in which the tiles of a list fail, either before their turn or in it; what it reports, and which tiles had their turn.
fn failing(tiles: usize, threads: usize, before: &[usize], during: &[usize]) -> (Result<(), Error>, Vec<usize>) {
    let grid = Grid::new(vec![1; tiles], 1);
    let turn = Turn::default();
    let control = Control::default();
    let passed = std::sync::Mutex::new(Vec::new());
    let fail = |i: usize| Err(Error::Usage(format!("tile {i}")));
    let result = pass::run(
        &grid,
        threads,
        &control,
        || (),
        |_| {},
        |(), i, _| {
            let result = (|| {
                if before.contains(&i) {
                    return fail(i);
                }
                turn.take(i, &control, || {
                    if during.contains(&i) {
                        return fail(i);
                    }
                    passed.lock().unwrap().push(i);
                    Ok(())
                })
            })();
            if result.is_err() {
                turn.give_up();
            }
            result
        },
    );
    (result, passed.into_inner().unwrap())
}

proptest! {
    #[test]
    fn the_earliest_error_is_the_one_reported(
        tiles in 1usize..60,
        threads in 1usize..9,
        before in prop::collection::vec(0usize..60, 0..4),
        during in prop::collection::vec(0usize..60, 0..2),
    ) {
        let (result, passed) = failing(tiles, threads, &before, &during);
        prop_assert!(passed.iter().copied().eq(0..passed.len()), "out of turn: {:?}", passed);
        let earliest = |list: &[usize]| list.iter().copied().filter(|&i| i < tiles).min();
        match (earliest(&before), earliest(&during)) {
            (None, None) => {
                prop_assert!(result.is_ok());
                prop_assert_eq!(passed.len(), tiles);
            }
            // A turn that somebody later has given up on may not come; whoever failed before a turn always says so.
            (Some(b), d) if d.is_none_or(|d| b < d) => {
                prop_assert_eq!(result.unwrap_err().to_string(), format!("tile {b}"));
            }
            (b, Some(d)) => {
                let said = result.unwrap_err().to_string();
                let possible = [Some(d), b].into_iter().flatten().map(|i| format!("tile {i}"));
                prop_assert!(possible.clone().any(|p| p == said), "{} is none of {:?}", said, possible.collect::<Vec<_>>());
            }
            _ => unreachable!(),
        }
    }
}

#[test]
fn the_earliest_error_wins_every_race() {
    // Neighbouring tiles fail at once: whichever thread is faster, the first of them is named.
    for round in 0..300 {
        let grid = Grid::new(vec![1; 64], 1);
        let started = AtomicUsize::new(0);
        let first = round % 50;
        // The first of them starts late: its worker is held up after it got the tile.
        let hold = |tile: &reasonvec::stream::Tile| {
            if tile.tensor == first + 8 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        let result = pass::run(
            &grid,
            8,
            &Control::default(),
            || (),
            hold,
            |(), i, _| {
                started.fetch_add(1, Ordering::Relaxed);
                if i >= first { Err(Error::Usage(format!("tile {i}"))) } else { Ok(()) }
            },
        );
        assert_eq!(result.unwrap_err().to_string(), format!("tile {first}"));
        assert!(started.load(Ordering::Relaxed) <= first + 8);
    }
}

#[test]
fn cancelling_stops_workers_that_wait_for_a_turn() {
    let grid = Grid::new(vec![1; 8], 1);
    let (turn, control) = (Turn::default(), Control::default());
    let result = pass::run(
        &grid,
        8,
        &control,
        || (),
        |_| {},
        |(), i, _| {
            if i == 0 {
                // The first turn never comes: its worker is cancelled while the others wait.
                while grid.len() > 1 && !control.cancelled() {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    control.cancel();
                }
                return Err(Error::Cancelled);
            }
            turn.take(i, &control, || Ok(()))
        },
    );
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn what_a_plan_predicts_is_what_it_expects() {
    let family = long_family();
    let plan = long_plan(&family, "out", false);
    let predicted = merge::predict(&plan, Operands(&family.operands)).unwrap();
    let (_, bytes) = expected_bytes(&plan, &family.operands);
    let sizes: HashMap<_, _> =
        files(&family.path("out")).into_iter().map(|f| (f.clone(), f.metadata().unwrap().len())).collect();
    let written: u64 =
        sizes.iter().filter(|(f, _)| f.extension().is_some_and(|e| e == "safetensors")).map(|(_, n)| n).sum();
    assert_eq!(predicted.written, written);
    let headers: u64 = family.checkpoint(2).shards().iter().map(|s| s.header.data_start).sum();
    assert_eq!(predicted.read + predicted.written - headers, bytes);
    assert!(predicted.memory <= MIB || predicted.threads == 1);
}
