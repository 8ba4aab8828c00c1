//! Machines in the background, by command and by curl: what they say, and what is left of the dead.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use wardian_tests::{Debian, Kernel, has, skip, wardian};

use crate::or_skip;

/// A runtime directory of our own; whatever machine runs in it is killed at the end.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().expect("a directory"))
    }

    fn at_home(&self, command: &mut Command) -> Output {
        let done = command.env("XDG_RUNTIME_DIR", self.0.path()).stdin(Stdio::null()).output();
        done.unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    fn wardian(&self, args: &[&str]) -> Output {
        self.at_home(Command::new(wardian()).args(args))
    }

    /// What a command that goes well prints.
    fn says(&self, args: &[&str]) -> String {
        let done = self.wardian(args);
        assert!(done.status.success(), "{args:?}: {done:?}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }

    fn json(&self, args: &[&str]) -> Value {
        let text = self.says(args);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    fn sockets(&self) -> PathBuf {
        self.0.path().join("wardian")
    }

    fn left(&self) -> usize {
        std::fs::read_dir(self.sockets()).map_or(0, Iterator::count)
    }

    /// A multiboot kernel of two instructions: hlt; jmp -3.
    fn sleeper(&self) -> String {
        let (magic, flags, base) = (0x1bad_b002u32, 1u32 << 16, 0x10_0000u32);
        let words =
            [magic, flags, 0u32.wrapping_sub(magic + flags), base, base, base + 35, base + 35, base + 32];
        let mut image: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        image.extend([0xf4, 0xeb, 0xfd]);
        let path = self.0.path().join("kernel");
        std::fs::write(&path, image).expect("a kernel");
        path.display().to_string()
    }

    fn start(&self, name: &str) -> Output {
        let kernel = self.sleeper();
        self.wardian(&["run", "--detach", "--name", name, "--kernel", &kernel, "--memory", "16M"])
    }

    fn pid(&self, name: &str) -> Pid {
        let info = self.json(&["info", name, "--json"]);
        info["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)).expect("a process")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let done = self.wardian(&["list", "--json"]);
        let all: Value = serde_json::from_slice(&done.stdout).unwrap_or_default();
        for machine in all.as_array().into_iter().flatten() {
            if let Some(pid) = machine["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

fn message(done: &Output) -> String {
    String::from_utf8_lossy(&done.stderr).into_owned()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(60), "not within 60 s: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn the_dead_leave_nothing_behind() {
    let place = Place::new();
    assert_eq!(place.json(&["list", "--json"]), serde_json::json!([]));
    let done = place.start("one");
    assert_eq!((done.status.code(), &*done.stdout), (Some(0), &b"one\n"[..]), "{}", message(&done));
    let again = place.start("one");
    assert_eq!(again.status.code(), Some(2));
    assert!(message(&again).contains("A machine named one runs already"), "{}", message(&again));
    place.start("two");
    let names = || -> Vec<String> {
        let all = place.json(&["list", "--json"]);
        all.as_array()
            .expect("a list")
            .iter()
            .map(|m| m["name"].as_str().unwrap_or_default().to_owned())
            .collect()
    };
    assert_eq!(names(), ["one", "two"]);
    // Killed, it leaves a socket, which whoever looks next removes.
    kill_process(place.pid("one"), Signal::KILL).expect("a signal");
    until("it is dead", || names() == ["two"]);
    assert_eq!(place.left(), 1);
    let gone = place.wardian(&["info", "one"]);
    assert_eq!(gone.status.code(), Some(2));
    assert_eq!(message(&gone), "wardian: No machine named one runs\n");
    // A machine that is stopped as a process is silent, and not taken for dead.
    let two = place.pid("two");
    kill_process(two, Signal::STOP).expect("a signal");
    assert_eq!(place.json(&["list", "--json"])[0]["status"], "silent");
    kill_process(two, Signal::CONT).expect("a signal");
    let mut waits = Command::new(wardian());
    let mut waits = waits
        .args(["wait", "two", "--json"])
        .env("XDG_RUNTIME_DIR", place.0.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it waits");
    assert_eq!(place.json(&["stop", "two", "--now", "--json"])["status"], 12);
    assert_eq!(waits.wait().expect("it ends").code(), Some(12), "the status of the machine");
    until("nothing is left", || place.left() == 0);
}

#[test]
fn what_cannot_be_run_in_the_background_says_so_in_the_foreground() {
    let place = Place::new();
    let done = place.wardian(&["run", "--detach", "--kernel", "/no/such"]);
    assert_eq!((done.status.code(), done.stdout.is_empty()), (Some(2), true));
    assert!(message(&done).contains("/no/such"), "{}", message(&done));
    let done = place.wardian(&["run", "--detach", "--name", "../x", "--kernel", &place.sleeper()]);
    assert_eq!(done.status.code(), Some(2));
    assert!(message(&done).contains("'../x' is no name for a machine"), "{}", message(&done));
    assert_eq!(place.left(), 0);
}

#[test]
fn curl_drives_everything() {
    if !has("curl") {
        return skip("curl is not installed");
    }
    let place = Place::new();
    assert!(place.start("box").status.success());
    let socket = place.sockets().join("box.sock");
    let curl = |args: &[&str]| -> (String, String) {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "60", "--write-out", "\n%{http_code}"]);
        let done = place.at_home(command.arg("--unix-socket").arg(&socket).args(args));
        assert!(done.status.success(), "{args:?}: {}", message(&done));
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        let (body, code) = text.rsplit_once('\n').expect("a code");
        (code.to_owned(), body.to_owned())
    };
    let document: Value = serde_json::from_str(&curl(&["http://box/openapi.json"]).1).expect("a document");
    let mut tried = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        let path =
            path.replace("{path}", "devices/serial").replace("{index}", "0").replace("{gpa}", "0x100000");
        let path = if path == "/events" { "/events?follow=false".to_owned() } else { path };
        let url = format!("http://box{path}");
        for method in operations.as_object().expect("operations").keys() {
            // These are for the end: this guest has nothing to take an NMI with.
            if ["/wait", "/stop", "/nmi"].contains(&&*path) {
                continue;
            }
            let (code, body) = curl(&["--request", &method.to_uppercase(), &url]);
            assert_eq!(code, "200", "{method} {path}: {body}");
            // A pause outlives a reset.
            let rests = ["/pause", "/reset"].contains(&&*path);
            until("it runs", || rests || curl(&["http://box/info"]).1.contains("\"running\""));
            tried += 1;
        }
        let (code, body) = curl(&["--request", "DELETE", &url]);
        assert!(code == "405" && body.contains("error"), "{path}: {code} {body}");
    }
    assert!(tried >= 16, "{tried}");
    let (code, body) = curl(&["--request", "POST", "http://box/resume", "--data", "clock=freeze"]);
    assert!(code == "415" && body.contains("takes application/json"), "{code} {body}");
    let json = ["--header", "Content-Type: application/json"];
    let post = |path: &str, body: &str| {
        let url = format!("http://box{path}");
        curl(&["--request", "POST", &url, "--data", body, json[0], json[1]])
    };
    assert_eq!(post("/resume", "{\"clock\":7}").0, "400");
    assert_eq!(post("/stop", "{\"how\":\"now\"}").0, "200");
    until("nothing is left", || place.left() == 0);
    assert!(place.start("box").status.success());
    assert_eq!(curl(&["--request", "POST", "http://box/nmi"]).0, "200");
    until("the NMI ended it", || place.left() == 0);
}

/// `wardian console`, by pipes.
struct Viewer {
    child: Child,
    seen: Vec<u8>,
}

impl Viewer {
    fn new(place: &Path, name: &str) -> Viewer {
        let child = Command::new(wardian())
            .args(["console", name])
            .env("XDG_RUNTIME_DIR", place)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a viewer");
        Viewer { child, seen: Vec::new() }
    }

    fn type_text(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("it takes input");
    }

    /// Reads until `text` has come since this was last asked; the machine's own limit ends it at the latest.
    fn wait_for(&mut self, text: &str) {
        let stdout = self.child.stdout.as_mut().expect("piped");
        let mut byte = [0];
        while !self.seen.ends_with(text.as_bytes()) {
            let count = stdout.read(&mut byte).expect("it prints");
            assert_eq!(count, 1, "it ended before {text:?}: {}", String::from_utf8_lossy(&self.seen));
            self.seen.push(byte[0]);
        }
        self.seen.clear();
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends the machine if a test hangs.
struct Watchdog(std::sync::mpsc::Sender<()>);

impl Watchdog {
    fn new(pid: Pid, limit: Duration) -> Watchdog {
        let (stop, stopped) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if stopped.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Watchdog(stop)
    }
}

#[test]
fn a_debian_guest_in_the_background() {
    let guest = or_skip!(Debian::shell(Kernel::Cloud));
    let place = Place::new();
    let run = guest.args(&["--cpus", "2", "--memory", "512M", "--detach", "--name", "debian"]).build();
    let done = place.at_home(&mut run.command());
    assert_eq!((done.status.code(), &*done.stdout), (Some(0), &b"debian\n"[..]), "{}", message(&done));
    let watchdog = Watchdog::new(place.pid("debian"), Duration::from_secs(240));
    let mut one = Viewer::new(place.0.path(), "debian");
    one.wait_for("# ");
    one.type_text("echo con$((40+2))\n");
    one.wait_for("con42");
    // A second one sees the past, and both see what each types.
    let mut two = Viewer::new(place.0.path(), "debian");
    two.wait_for("con42");
    two.type_text("echo two$((6*7))\n");
    two.wait_for("two42");
    one.wait_for("two42");
    drop(one);

    assert_eq!(place.json(&["pause", "debian", "--json"])["status"], "paused");
    let clock = || place.json(&["inspect", "debian", "time/now_ns", "--json"]).as_u64().expect("a number");
    let before = clock();
    assert_eq!(place.json(&["info", "debian", "--json"])["status"], "paused");
    assert_eq!(clock(), before, "guest time stands still");
    assert_eq!(place.json(&["resume", "debian", "--clock", "freeze", "--json"])["changed"], true);
    two.type_text("echo on$((6*7))\n");
    two.wait_for("on42");

    let rip = place.json(&["inspect", "debian", "vcpus/1/registers/rip", "--json"]);
    assert!(rip.as_str().is_some_and(|rip| rip.starts_with("0x")), "{rip}");
    let devices = place.says(&["inspect", "debian", "devices"]);
    for device in ["serial", "lapic", "ioapic", "hpet", "pit", "rtc", "virtio-blk"] {
        assert!(devices.contains(device), "{device} in {devices}");
    }
    let metrics = place.says(&["metrics", "debian"]);
    assert!(
        metrics.contains("wardian_exits_total{machine=\"debian\",vcpu=\"0\",kind=\"halt\"}"),
        "{metrics}"
    );
    assert!(metrics.contains("wardian_ticks_total{machine=\"debian\",timer=\"lapic."), "{metrics}");
    let events = place.says(&["events", "debian", "--no-follow", "--json"]);
    let names: Vec<Value> = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["event"].clone())
        .filter(|name| name != "no-progress" && name != "progress")
        .collect();
    assert_eq!(names, ["paused", "resumed"]);
    two.type_text("poweroff -f\n");
    assert_eq!(place.wardian(&["wait", "debian"]).status.code(), Some(0));
    until("nothing is left", || place.left() == 0);
    let _ = watchdog.0.send(());
}
