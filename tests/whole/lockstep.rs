//! Our engine beside another emulator, instruction by instruction.

use std::process::{Command, Output};

use wardian_tests::{has, skip, wardian};

fn lockstep(args: &[&str]) -> Output {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--",
        "lockstep",
    ]);
    command.arg("--wardian").arg(wardian()).args(args);
    command.output().expect("cargo starts")
}

#[test]
fn no_register_differs() {
    if !has("qemu-system-x86_64") {
        return skip("qemu-system-x86 is not installed");
    }
    let output = lockstep(&["--quick"]);
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && text.contains("30000 instructions in lock step: no difference"),
        "{text}"
    );
}

#[test]
fn a_register_that_is_wrong_is_found() {
    if !has("qemu-system-x86_64") {
        return skip("qemu-system-x86 is not installed");
    }
    let output = lockstep(&["--guest", "hello", "--steps", "2000", "--plant", "rdi:1500"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("after 1501 steps the two differ in rdi"), "{text}");
}
