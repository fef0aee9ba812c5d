//! A manifest and a data file, opened as a vector and read to the last element.
//!
//! Two bytes for the length of the manifest and two for that of the data's header; then manifest, header, data.

#![no_main]

use libfuzzer_sys::fuzz_target;
use reasonvec::Error;
use reasonvec::operand::{Source, Term};
use reasonvec::simd::Level;
use reasonvec::store::Pool;
use reasonvec::stream::BLOCK;
use reasonvec::vector::VectorFolder;

fuzz_target!(|input: &[u8]| {
    let Some((&[a, b, c, d], rest)) = input.split_first_chunk::<4>() else { return };
    let (manifest, rest) = rest.split_at(usize::from(u16::from_le_bytes([a, b])).min(rest.len()));
    let (header, data) = rest.split_at(usize::from(u16::from_le_bytes([c, d])).min(rest.len()));
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("vector_config.json"), manifest).expect("a file");
    let file = [&(header.len() as u64).to_le_bytes(), header, data].concat();
    std::fs::write(folder.path().join("vector_model.safetensors"), file).expect("a file");
    match read(folder.path()) {
        Ok(()) | Err(Error::Format { .. }) => {}
        Err(other) => panic!("{other:?}"),
    }
});

fn read(folder: &std::path::Path) -> Result<(), Error> {
    let level = Level::current()?;
    let vector = VectorFolder::open(folder)?;
    let pool = Pool::default();
    for row in &vector.rows {
        let stored = vector.tensor(&row.name)?;
        // A zero can be as long as it likes; whatever else has as many elements as its file has room for, but for factors, whose product
        // has the square of that: its first blocks stand for the rest.
        if stored.is_zero() {
            continue;
        }
        let term = Term::new(1.0, Source::Stored(stored));
        for block in 0..row.elements.div_ceil(BLOCK).min(4) {
            let range = block * BLOCK..((block + 1) * BLOCK).min(row.elements);
            let mut values = vec![0f64; (range.end - range.start) as usize];
            let mut reader = term.open::<f64>(range.clone(), &pool)?;
            reader.add(level, &mut values, range.clone(), true)?;
            reader.corrections(block, &mut Vec::new())?;
            // And a run that begins and ends inside the block.
            let inside = range.start + (range.end - range.start) / 3..range.end - (range.end - range.start) / 4;
            let mut again = vec![0f64; (inside.end - inside.start) as usize];
            term.open::<f64>(inside.clone(), &pool)?.add(level, &mut again, inside.clone(), true)?;
            let from = (inside.start - range.start) as usize;
            let same = again.iter().zip(&values[from..]).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
            assert!(same, "a part of a block is not a part of the whole");
        }
    }
    Ok(())
}
