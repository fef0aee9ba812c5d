//! Text as the header of a file with some data behind it, judged beside the `safetensors` crate.

#![no_main]

use libfuzzer_sys::fuzz_target;
use reasonvec::store::header::Header;
use safetensors::SafeTensors;

fuzz_target!(|input: &[u8]| {
    let Some((length, text)) = input.split_first_chunk::<2>() else { return };
    let data = u16::from_le_bytes(*length);
    let Ok(text) = std::str::from_utf8(text) else { return };
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text.as_bytes());
    file.resize(file.len() + usize::from(data), 0);
    match (Header::parse(text, u64::from(data)), SafeTensors::read_metadata(&file)) {
        (Ok(header), Ok((_, metadata))) => {
            assert_eq!(header.entries.len(), metadata.tensors().len());
            for entry in &header.entries {
                let info = metadata.info(&entry.name).expect("a tensor of ours is one of theirs");
                let begin = (entry.begin - header.data_start) as usize;
                let end = (entry.end - header.data_start) as usize;
                assert_eq!(info.data_offsets, (begin, end));
            }
        }
        (Ok(_), Err(e)) => panic!("taken, but safetensors says {e}"),
        (Err(problem), Ok(_)) => assert!(ours_alone(text, &problem), "safetensors takes it, but: {problem}"),
        (Err(_), Err(_)) => {}
    }
});

/// The rules that only we have: nothing twice, no formats that we do not know, `{` in front; and what serde reads into a
/// struct or an enum, as the `safetensors` crate lets it, although the format knows only objects and names.
fn ours_alone(text: &str, problem: &str) -> bool {
    let shape = ["invalid type: map, expected a string", "invalid type: sequence", "expected a map"];
    problem.contains("stands twice")
        || problem.contains("does not know")
        || !text.starts_with('{')
        || shape.iter().any(|s| problem.contains(s))
}
