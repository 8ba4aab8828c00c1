//! `wardian run` from outside: each bad input has one message and its status, and damages nothing; tiny
//! multiboot guests end as they should.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Address of the first byte of a tiny guest's code.
const ENTRY: u32 = 0x10_0040;

/// A multiboot 1 kernel (ELF32) whose code is `code`, entered in 32-bit protected mode at [`ENTRY`].
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0u8; 0x1000];
    elf[..16].copy_from_slice(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes()); // executable
    put(18, &3u16.to_le_bytes()); // i386
    put(20, &1u32.to_le_bytes());
    put(24, &ENTRY.to_le_bytes());
    put(28, &52u32.to_le_bytes()); // program headers
    put(40, &52u16.to_le_bytes());
    put(42, &32u16.to_le_bytes());
    put(44, &1u16.to_le_bytes());
    let len = 0x40 + code.len() as u32;
    let header = [1, 0x1000, 0x10_0000, 0x10_0000, len, len, 7, 0x1000u32];
    header.iter().enumerate().for_each(|(n, word)| put(52 + 4 * n, &word.to_le_bytes()));
    for word in [0x1bad_b002u32, 0, 0u32.wrapping_sub(0x1bad_b002)] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.resize(0x1040, 0);
    elf.extend_from_slice(code);
    elf
}

/// mov al, value; out F4h, al; hlt; jmp -3
fn exit_with(value: u8) -> Vec<u8> {
    kernel(&[0xb0, value, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd])
}

struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wardian"));
    command.arg("run").args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for the end, which must come within a minute.
fn ended(mut child: Child) -> Output {
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it does not end: {}", text(&child.wait_with_output().unwrap().stderr));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

fn run(args: &[&str]) -> Output {
    ended(command(args).spawn().unwrap())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn str_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs with bad input: the status, and one message that says `want`.
fn refused(args: &[&str], status: i32, want: &str) {
    let output = run(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
    assert!(stderr.contains(want), "{args:?}: {stderr}");
    let messages = stderr.lines().filter(|l| l.starts_with("wardian:") || l.starts_with("error:")).count();
    assert_eq!(messages, 1, "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

#[test]
fn bad_kernels() {
    let place = Place::new();
    refused(&[], 2, "No kernel is given");
    refused(&["--kernel", str_of(&place.path("none"))], 2, "none");
    refused(&["--kernel", str_of(&place.file("empty", b""))], 2, "empty is truncated");
    refused(&["--kernel", str_of(&place.file("text", &[b'a'; 5000]))], 2, "text is no kernel");
    let good = exit_with(1);
    refused(&["--kernel", str_of(&place.file("cut", &good[..0x1010]))], 2, "cut is truncated");
    let mut arm = vec![0; 0x1000];
    arm[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0");
    refused(&["--kernel", str_of(&place.file("arm", &arm))], 2, "arm is a kernel for");
    refused(&["--kernel", str_of(place.dir.path())], 2, "not a regular file");
}

#[test]
fn bad_memory_cpus_and_initrds() {
    let place = Place::new();
    let kernel = place.file("kernel", &exit_with(1));
    let kernel = str_of(&kernel);
    let initrd = place.file("initrd", &vec![0; 9 << 20]);
    refused(&["--kernel", kernel, "--memory", "8M", "--initrd", str_of(&initrd)], 2, "does not fit");
    refused(&["--kernel", kernel, "--initrd", str_of(&place.path("no"))], 2, "Cannot read");
    refused(&["--kernel", kernel, "--memory", "4K"], 2, "the least is 2M");
    refused(&["--kernel", kernel, "--memory", "lots"], 2, "memory size");
    refused(&["--kernel", kernel, "--memory", "900G"], 2, "the most is 256G");
    for count in ["0", "65", "-1", "x"] {
        refused(&["--kernel", kernel, "--cpus", count], 2, "give 1 to 64");
    }
    refused(&["--kernel", kernel, "--cpu", "pentium"], 2, "Unknown processor model");
    refused(&["--kernel", kernel, "--cpu", "host,+warp"], 2, "Unknown processor feature");
    refused(&["--kernel", kernel, "--engine", "fast"], 2, "give auto, soft");
    refused(&["--kernel", kernel, "--serial", "pty"], 2, "give stdio, file:PATH or none");
    refused(&["--kernel", kernel, "--serial", "stdio", "--console", "stdio"], 2, "give it to one of them");
    refused(&["--kernel", kernel, "--gdb", "99999"], 2, "no address");
    refused(&["--kernel", kernel, "--frobnicate"], 2, "--frobnicate");
}

#[test]
fn bad_disks() {
    let place = Place::new();
    let kernel = place.file("kernel", &exit_with(1));
    let (kernel, log) = (str_of(&kernel), format!("file:{}", str_of(&place.path("log"))));
    let disk = place.file("disk", &[7; 4096]);
    let base = ["--kernel", kernel, "--serial", &log];
    let with = |disk: &str, want: &str| refused(&[&base[..], &["--disk", disk]].concat(), 2, want);
    with(str_of(&place.path("none")), "Could not open disk");
    with(str_of(place.dir.path()), "neither a file nor a block device");
    with(&format!("{},format=vmdk", str_of(&disk)), "format");
    with(&format!("{},sync", str_of(&disk)), "no option");
    with(&format!("{},format=qcow2", str_of(&disk)), "qcow2");
    with(str_of(&place.file("nothing", b"")), "empty");
    let twice = [&base[..], &["--disk", str_of(&disk), "--disk", str_of(&disk)]].concat();
    refused(&twice, 2, "in use");
    let held = fs::File::options().read(true).write(true).open(&disk).unwrap();
    held.try_lock().unwrap();
    with(str_of(&disk), "in use");
    drop(held);
    assert_eq!(fs::read(&disk).unwrap(), [7; 4096], "a refused disk is not changed");
    assert_eq!(place.names(), ["disk", "kernel", "nothing"], "nothing was created");
}

#[test]
fn bad_configuration_files() {
    let place = Place::new();
    place.file("kernel", &exit_with(1));
    let file = |text: &str| place.file("guest.toml", text.as_bytes());
    refused(&[str_of(&place.path("none.toml"))], 2, "Could not read configuration");
    let path = file("kernel = \"kernel\"\nmemroy = \"1G\"\n");
    refused(&[str_of(&path)], 2, "guest.toml:2:1: unknown field `memroy`");
    refused(&[str_of(&file("kernel = \"kernel\"\ncpus = 100\n"))], 2, "guest.toml:2:8: field `cpus`");
    refused(&[str_of(&file("kernel = [\n"))], 2, "guest.toml:");
}

#[test]
fn a_file_and_options_make_a_machine() {
    let place = Place::new();
    place.file("kernel", &exit_with(3));
    let other = place.file("other", &exit_with(5));
    let path = place.file(
        "guest.toml",
        b"name = \"tiny\"\nkernel = \"kernel\"\nmemory = \"16M\"\ndebug-exit = true\nserial = \"none\"\n",
    );
    let output = run(&[str_of(&path)]);
    assert_eq!(output.status.code(), Some(7), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("Engine soft"), "{}", text(&output.stderr));
    assert_eq!(run(&[str_of(&path), "--kernel", str_of(&other)]).status.code(), Some(11));
}

#[test]
fn output_goes_where_it_should() {
    let place = Place::new();
    // Prints H to the serial port, i to the debug console, exits with 0.
    let code = [
        0x66, 0xba, 0xf8, 0x03, 0xb0, b'H', 0xee, 0xb0, b'i', 0xe6, 0xe9, 0xb0, 0, 0xe6, 0xf4, 0xf4, 0xeb,
        0xfd,
    ];
    let kernel = place.file("kernel", &kernel(&code));
    let base = ["--kernel", str_of(&kernel), "--debug-exit", "--memory", "16M"];
    let output = run(&base);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), "Hi"));
    let log = place.path("log");
    let (serial, json) = (format!("file:{}", str_of(&log)), place.path("stats.json"));
    let more = ["--serial", &serial, "--debug-console", "none", "--stats", "--stats-json", str_of(&json)];
    let output = run(&[&base[..], &more].concat());
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    assert_eq!(fs::read(&log).unwrap(), b"H");
    assert!(text(&output.stderr).contains("port-out"), "{}", text(&output.stderr));
    assert!(fs::read_to_string(&json).unwrap().contains("\"kind\": \"port-out\""));
    refused(&[&base[..], &["--serial", "file:/nonexistent/log"]].concat(), 2, "Could not create");
}

#[test]
fn each_end_has_its_status() {
    let place = Place::new();
    let mut number = 0;
    let mut status = |code: &[u8], more: &[&str]| {
        number += 1;
        let kernel = place.file(&format!("kernel{number}"), &kernel(code));
        run(&[&["--kernel", str_of(&kernel), "--memory", "16M", "--serial", "none"], more].concat())
    };
    // lidt of a zero limit; ud2
    let triple = [0x0f, 0x01, 0x1d, 0x00, 0x00, 0x00, 0x00, 0x0f, 0x0b];
    let output = status(&triple, &[]);
    assert_eq!(output.status.code(), Some(6), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("triple fault: vCPU 0 at 0x100"), "{}", text(&output.stderr));
    // mov al, FEh; out 64h, al: keyboard controller reset
    let reset = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    assert_eq!(status(&reset, &["--no-reboot"]).status.code(), Some(4));
    // mov dx, 604h; mov ax, 1 << 13 | 5 << 10; out dx, ax: ACPI soft off
    let off = [0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xf4, 0xeb, 0xfd];
    let output = status(&off, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn a_reset_starts_anew_and_keeps_output_and_disk() {
    let place = Place::new();
    // CMOS byte 40h would not survive; the debug console shows each life: prints R, then resets.
    let code = [0xb0, b'R', 0xe6, 0xe9, 0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
    let kernel = place.file("kernel", &kernel(&code));
    let disk = place.file("disk", &[7; 4096]);
    let mut child =
        command(&["--kernel", str_of(&kernel), "--memory", "16M", "--disk", str_of(&disk)]).spawn().unwrap();
    let mut three = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut three).unwrap();
    assert_eq!(&three, b"RRR");
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let output = ended(child);
    assert_eq!(output.status.code(), Some(12), "{}", text(&output.stderr));
}

#[test]
fn signals_end_a_sleeping_machine() {
    let place = Place::new();
    // cli; hlt; jmp -3
    let kernel = place.file("kernel", &kernel(&[0xb0, b'.', 0xe6, 0xe9, 0xfa, 0xf4, 0xeb, 0xfc]));
    for signal in ["-INT", "-TERM"] {
        let mut child =
            command(&["--kernel", str_of(&kernel), "--memory", "16M", "--cpus", "3"]).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = ended(child);
        assert_eq!(output.status.code(), Some(12), "{signal}: {}", text(&output.stderr));
    }
}

#[test]
fn stock_gdb_debugs_a_tiny_guest() {
    if Command::new("gdb").arg("--version").output().is_err() {
        eprintln!("skipped, because gdb is not installed");
        return;
    }
    let place = Place::new();
    // nop; inc eax; jmp -4 (the loop), never ends by itself
    let kernel = place.file("kernel", &kernel(&[0xb8, 0, 0, 0, 0, 0x90, 0x40, 0xeb, 0xfc]));
    let socket = place.path("gdb");
    let child = command(&["--kernel", str_of(&kernel), "--memory", "16M", "--cpus", "2"])
        .args(["--gdb", str_of(&socket), "--gdb-wait"])
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while !socket.exists() {
        assert!(begin.elapsed() < Duration::from_secs(20), "no socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    let lines = [
        format!("target remote {}", str_of(&socket)),
        "printf \"first at %lx\\n\", $rip".to_owned(),
        "break *0x100046".to_owned(),
        "continue".to_owned(),
        "printf \"eax %d\\n\", $rax".to_owned(),
        "stepi".to_owned(),
        "printf \"then %lx eax %d\\n\", $rip, $rax".to_owned(),
        "continue".to_owned(),
        "printf \"again %d\\n\", $rax".to_owned(),
        "info threads".to_owned(),
        "x/4xb 0x100045".to_owned(),
        "p $cr0".to_owned(),
        "kill".to_owned(),
    ];
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set pagination off"]);
    for line in &lines {
        gdb.args(["-ex", line]);
    }
    let output = gdb.output().unwrap();
    let all = format!("{}{}", text(&output.stdout), text(&output.stderr));
    for want in ["first at 100040", "eax 0", "then 100047 eax 1", "again 1", "vCPU 1", "0x90", "0x40", "PE"] {
        assert!(all.contains(want), "{want:?} is missing:\n{all}");
    }
    let output = ended(child);
    assert_eq!(output.status.code(), Some(12), "{}\n{all}", text(&output.stderr));
    assert!(!socket.exists());
}
