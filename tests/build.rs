//! Lists the tiny guests of `guests/src/bin`, so that each is a test of its own.
#![forbid(unsafe_code)]

use std::path::Path;
use std::{env, fs};

fn main() {
    let guests = Path::new(&env::var_os("CARGO_MANIFEST_DIR").expect("cargo")).join("../guests/src/bin");
    println!("cargo::rerun-if-changed={}", guests.display());
    let mut names: Vec<String> = fs::read_dir(&guests)
        .map(|entries| {
            let names =
                entries.filter_map(|entry| entry.ok()?.path().file_stem()?.to_str().map(str::to_owned));
            names.collect()
        })
        .unwrap_or_default();
    names.sort();
    let list: String = names.iter().map(|name| format!("guest!({name});\n")).collect();
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo")).join("guests.rs");
    fs::write(out, list).expect("the build folder can be written");
}
