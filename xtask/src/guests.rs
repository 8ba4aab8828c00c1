//! `cargo xtask guests`: builds the bare-metal guests of `guests/` into `target/guests`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::repository;

#[derive(clap::Args)]
pub struct Args {
    /// Only these guests; all without.
    names: Vec<String>,
}

pub fn main(args: &Args) -> Result<()> {
    for guest in build(&args.names)? {
        println!("{}", guest.display());
    }
    Ok(())
}

/// Builds the guests of these names, or all for none; says where they are.
///
/// # Errors
/// When they do not build.
pub fn build(names: &[String]) -> Result<Vec<PathBuf>> {
    let top = repository();
    let source = top.join("guests");
    let out = top.join("target/guests");
    let build = out.join("build");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The guests have their own flags (guests/.cargo/config.toml), read from the folder cargo runs in.
    cargo.current_dir(&source).args(["build", "--release", "--quiet"]).env("CARGO_TARGET_DIR", &build);
    cargo.env_remove("RUSTFLAGS").env_remove("CARGO_ENCODED_RUSTFLAGS");
    if names.is_empty() {
        cargo.arg("--workspace");
    }
    for name in names {
        cargo.args(["--bin", name]);
    }
    let status = cargo.status().context("Cannot start cargo")?;
    if !status.success() {
        bail!("Building the guests failed");
    }
    let mut made = Vec::new();
    for entry in fs::read_dir(source.join("src/bin"))? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|n| n.to_str()) else { continue };
        if !names.is_empty() && !names.iter().any(|n| n == name) {
            continue;
        }
        let to = out.join(name);
        let part = out.join(format!("{name}.part"));
        let built = build.join("x86_64-unknown-linux-gnu/release").join(name);
        fs::copy(&built, &part).with_context(|| format!("Cannot copy {}", built.display()))?;
        fs::rename(&part, &to)?;
        made.push(to);
    }
    made.sort();
    Ok(made)
}
