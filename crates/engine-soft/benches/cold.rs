//! `cargo bench -p wardian-engine-soft --bench cold`: guest instructions a second on code that was never run, all in,
//! over the texts of the C library and of bash. Fails below the promise.
#![allow(missing_docs)]

use std::path::Path;

use wardian_engine_soft::cold;

/// Guest instructions a second.
const PROMISE: f64 = 5e6;
/// The best of these counts: a busy host makes the others slower.
const ROUNDS: usize = 15;
const FILES: [&str; 3] = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/bin/bash"];

fn main() {
    let mut kept = true;
    for file in FILES.iter().filter(|file| Path::new(file).is_file()) {
        let image = std::fs::read(file).unwrap_or_default();
        let Some(text) = text(&image) else {
            println!("{file}: skipped, because it is no 64-bit ELF file with a text");
            continue;
        };
        let mut runs = Vec::new();
        for _ in 0..ROUNDS {
            match cold::measure(text) {
                Ok(run) => runs.push(run),
                Err(error) => {
                    println!("{file}: {error}");
                    std::process::exit(1);
                }
            }
        }
        runs.sort_by_key(|run| run.took.0);
        let (run, middle) = (runs[0], runs[ROUNDS / 2].took.0 as f64 / 1e6);
        let seconds = run.took.0 as f64 / 1e9;
        let rate = run.instructions as f64 / seconds;
        kept &= rate >= PROMISE;
        println!(
            "{file}: {} instructions in {} blocks, {:.1} ms (best of {ROUNDS}; median {middle:.1}): {:.2} million a second, {:.0} ns \
             each, {:.1} host bytes each",
            run.instructions,
            run.blocks,
            seconds * 1e3,
            rate / 1e6,
            1e9 / rate,
            run.code_bytes as f64 / run.instructions as f64,
        );
    }
    if !kept {
        println!("promise MISSED: {:.0} million a second", PROMISE / 1e6);
        std::process::exit(1);
    }
}

/// The first executable segment of an ELF file (System V ABI, chapter 5).
fn text(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u64::from_le_bytes(image.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?));
    if image.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (headers, size, count) = (word(32)? as usize, usize::from(half(54)?), usize::from(half(56)?));
    (0..count).find_map(|n| {
        let at = headers + n * size;
        // Type and flags share a word: PT_LOAD, and PF_X among the flags.
        let kind = word(at)?;
        let wanted = kind as u32 == 1 && kind >> 32 & 1 != 0;
        let (from, len) = (word(at + 8)? as usize, word(at + 32)? as usize);
        wanted.then(|| image.get(from..from.checked_add(len)?)).flatten()
    })
}
