//! Manifests of vectors, and the data that they speak of.

use std::path::Path;

use proptest::prelude::*;
use reasonvec::Error;
use reasonvec::dtype::Dtype;
use reasonvec::operand::{Source, Term};
use reasonvec::plan::{Operand, Operands};
use reasonvec::simd::Level;
use reasonvec::store::Pool;
use reasonvec::store::header::{Entry, Header};
use reasonvec::stream::{BLOCK, Control};
use reasonvec::vector::VectorFolder;
use serde_json::{Value, json};

use crate::common::{Family, Tensor, apply, apply_plan, how, plan, stored, vector, write_shard};
use crate::within_seconds;

/// A vector folder that can be spoiled: its manifest as JSON, and the entries of its data file.
struct Spoil {
    family: Family,
    config: Value,
    data: Vec<Tensor>,
}

impl Spoil {
    /// Tensors in every encoding: `codes` and `short` with escapes, `full`, `every` (dense), `none`; `full` and `every` with second parts.
    fn new() -> Self {
        let steps: [Step; 5] = [
            ("codes", Dtype::BF16, |i| match i {
                i if i % 50 == 3 => 0.003,
                i if i % 5 == 0 => old(i) + 0.0078125,
                i => old(i),
            }),
            ("short", Dtype::F32, |i| match i {
                i if i % 50 == 3 => old(i) + 0.001,
                i if i % 4 == 0 => old(i) + (i / 4 + 1) as f64 / 1024.0,
                i => old(i),
            }),
            ("full", Dtype::F32, |i| match i {
                i if i % 8 == 0 => 1e-30 * (i + 1) as f64,
                i if i % 2 == 1 => old(i) + (i as f64 + 0.3) / 900.0,
                i => old(i),
            }),
            ("every", Dtype::F32, |i| if i % 9 == 0 { 1e-30 } else { old(i) + (i as f64 + 0.3) / 1000.0 }),
            ("none", Dtype::BF16, old),
        ];
        let positive = steps.map(|(name, dtype, new)| Tensor::floats(name, dtype, (0..N).map(new)));
        let negative = steps.map(|(name, dtype, _)| Tensor::floats(name, dtype, (0..N).map(old)));
        let mut family = Family::single(&positive, &negative, &negative);
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
        let header =
            Header::parse(std::str::from_utf8(&bytes[8..start]).unwrap(), (bytes.len() - start) as u64).unwrap();
        let tensor = |e: Entry| Tensor {
            name: e.name,
            dtype: e.dtype,
            shape: e.shape,
            bytes: bytes[e.begin as usize..e.end as usize].to_vec(),
        };
        self.data = header.entries.into_iter().map(tensor).collect();
    }

    fn save(&mut self) {
        // How many bytes a row says it has would tell on every other change; one case is about it.
        for row in self
            .config
            .get_mut("tensors")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
            .filter(|r| r["bytes"] != u64::MAX && r.is_object())
        {
            let entries: Vec<&str> =
                row["parts"].as_object().unwrap().values().filter_map(|p| p["entry"].as_str()).collect();
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

/// A tensor of the positive donor: its name, its format, its elements.
type Step = (&'static str, Dtype, fn(u64) -> f64);

/// Elements of each.
const N: u64 = 480;

/// The negative donor's elements: 64 different ones, each of eight bits.
fn old(i: u64) -> f64 {
    1.0 + (i * 7 % 64) as f64 / 128.0
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
    let plan =
        apply_plan(&family.path("out"), family.checkpoint(2), 2, how(2, 16 << 20), |name| vec![stored(1.0, 3, name)]);
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
    ("an unknown encoding", "", "wavelet", |s| s.row("codes")["encoding"] = "wavelet".into()),
    ("a zero with parts", "codes", "zero", |s| s.row("codes")["encoding"] = "zero".into()),
    ("a zero that moved", "none", "zero", |s| s.row("none")["moved"] = 5.into()),
    ("another encoding than the parts'", "codes", "values", |s| s.row("codes")["encoding"] = "dense".into()),
    ("dense without values", "every", "values", |s| s.without("every", "values")),
    ("an entry that is not there", "codes", "nowhere", |s| {
        s.row("codes")["parts"]["values"]["entry"] = "nowhere".into()
    }),
    ("a padding that is not there", "codes", "nowhere", |s| {
        s.row("codes")["parts"]["padding"] = json!({"entry": "nowhere", "digest": null})
    }),
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
    let mut spoil = Spoil::new();
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
        let step = move |i: u64| if moves && i.is_multiple_of(1000) { 1.0078125 } else { 1.0 };
        Tensor::floats("w", Dtype::BF16, (0..n).map(step))
    };
    let mut family = Family::one(&one(true), &one(false), &one(false));
    family.extract("sparse");
    let config = serde_json::from_str(&std::fs::read_to_string(family.path("v").join(CONFIG)).unwrap()).unwrap();
    let mut spoil = Spoil { family, config, data: Vec::new() };
    spoil.load();
    spoil.config["digest"] = "none".into();
    let data = spoil.data.clone();
    let cases: [(&str, u64, u64); 4] =
        [("set bits", 262, 0), ("set bits", 264, 0), ("starts", 300, 0), ("starts", 263, 1)];
    for (says, values, escapes) in cases {
        spoil.data = data.clone();
        spoil.set("w:starts", 2, values);
        spoil.set("w:starts", 3, escapes);
        spoil.save();
        for outcome in [decode(&spoil.family.path("v")), trust(&mut spoil.family)] {
            match outcome {
                Err(Error::Format { problem, .. }) => {
                    assert!(problem.contains(says) && problem.contains('w'), "{problem}")
                }
                other => panic!("{values} {escapes}: {other:?}"),
            }
        }
    }
}

#[test]
fn manifests_that_say_something_twice_are_refused() {
    let mut spoil = Spoil::new();
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
            Err(Error::Format { path, problem }) => {
                assert!(path.ends_with(CONFIG) && problem.contains(says), "{problem}")
            }
            other => panic!("{says}: {other:?}"),
        }
    }
    std::fs::write(spoil.family.path("v").join(CONFIG), b"{\"format\":1,\"\xFF\":0,\"tensors\":[]}").unwrap();
    assert!(matches!(decode(&spoil.family.path("v")), Err(Error::Format { .. })));
}

#[test]
fn what_a_reader_need_not_know_is_passed_over() {
    let mut spoil = Spoil::new();
    spoil.config["recipe"] = json!({"a": [1, 2]});
    spoil.row("codes")["note"] = json!(null);
    spoil.row("every")["parts"]["values"]["note"] = json!(1.5);
    spoil.save();
    decode(&spoil.family.path("v")).unwrap();
    trust(&mut spoil.family).unwrap();
}

#[test]
fn a_vector_without_its_data_is_refused() {
    let mut spoil = Spoil::new();
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
    let mut spoil = Spoil::new();
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
        let operands = [Operand::Vector(vector(&folder))];
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
        let mut spoil = Spoil::new();
        spoil.save();
        [CONFIG, DATA].map(|name| std::fs::read(spoil.family.path("v").join(name)).unwrap())
    });
    [&files[0], &files[1]]
}
