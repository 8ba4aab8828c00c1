//! The package archive, as this machine's apt knows it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run::{Step, is_root, output};

/// The machine's distribution release by its codename, from os-release(5).
pub fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("Cannot read /etc/os-release")?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix('='))
            .map(|v| v.trim_matches('"').to_owned())
    };
    match (field("ID").as_deref(), field("VERSION_CODENAME")) {
        (Some("debian"), Some(codename)) => Ok(codename),
        (id, _) => bail!("This command needs a Debian release to take packages from; this machine is {id:?}"),
    }
}

/// Address of the archive that carries `codename`, asked of apt.
pub fn mirror(codename: &str) -> Result<String> {
    let format = "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(CREATED_BY)|$(REPO_URI)";
    let text = output(Command::new("apt-get").args(["indextargets", "--format", format]))?;
    text.lines()
        .filter_map(|line| {
            let part: Vec<&str> = line.split('|').collect();
            (part.len() == 5 && part[..4] == ["Debian", codename, "main", "Packages"])
                .then(|| part[4].to_owned())
        })
        .next()
        .with_context(|| format!("apt on this machine knows no archive of {codename}: run apt-get update"))
}

/// Makes sure that apt knows `package`, updating its lists if they are empty or `fresh` is wanted.
pub fn know(package: &str, fresh: bool) -> Result<()> {
    let known = || output(Command::new("apt-cache").args(["show", package])).is_ok_and(|t| !t.is_empty());
    if known() && !fresh {
        return Ok(());
    }
    if is_root() {
        let step = Step::begin("Updating the package lists");
        step.run(Command::new("apt-get").args(["update", "-q"]))?;
        step.end();
    }
    if !known() {
        bail!("apt knows no package {package}: run apt-get update as root, with an archive that has it");
    }
    Ok(())
}

/// The package that a meta-package stands for: its first dependency that begins with `prefix`.
pub fn stands_for(meta: &str, prefix: &str) -> Result<String> {
    let text = output(Command::new("apt-cache").args(["show", "--no-all-versions", meta]))?;
    text.lines()
        .find_map(|l| l.strip_prefix("Depends: "))
        .into_iter()
        .flat_map(|depends| depends.split([',', '|']))
        .filter_map(|d| d.split_whitespace().next())
        .find(|d| d.starts_with(prefix))
        .map(str::to_owned)
        .with_context(|| format!("Package {meta} depends on no {prefix}*"))
}

/// Downloads `package` into `dir`; apt checks its signature chain. Returns the file.
pub fn download(step: &Step, package: &str, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir)?;
    step.run(Command::new("apt-get").args(["download", "-q", package]).current_dir(dir))?;
    let prefix = format!("{package}_");
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".deb"))
        {
            return Ok(path);
        }
    }
    bail!("apt-get download {package} left no file in {}", dir.display())
}
