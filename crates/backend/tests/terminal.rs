//! The terminal is as it was, whatever way the process ends: a child of this test lives on a pseudoterminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use wardian_backend::{Event, EventLoop, Next, Terminal, on_terminate};

const ROLE: &str = "WARDIAN_TEST_TERMINAL_ROLE";

/// Not a test by itself: what the child does.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let events = EventLoop::start().unwrap();
    let (tell, wait) = mpsc::channel();
    let (quit, asked) = (tell.clone(), tell.clone());
    let sink = Box::new(move |bytes: &[u8]| {
        tell.send(format!("typed {bytes:?}")).unwrap();
        bytes.len()
    });
    let terminal = Terminal::attach(&events.handle(), sink, move || quit.send("quit".into()).unwrap());
    let _terminal = terminal.unwrap();
    if role == "asked" {
        let event = Arc::new(Event::new().unwrap());
        on_terminate(Arc::clone(&event)).unwrap();
        events.handle().add(Arc::clone(&event), move || {
            assert!(event.take());
            asked.send("asked".into()).unwrap();
            Next::Keep
        });
    }
    println!("ready");
    if role == "panic" {
        let _ = std::thread::spawn(|| panic!("on purpose")).join();
        println!("panicked");
    }
    for told in wait {
        println!("{told}");
        if !told.starts_with("typed") {
            return;
        }
    }
}

struct Session {
    master: File,
    child: Child,
    seen: String,
    /// Keeps the modes alive when the child is gone.
    _slave: OwnedFd,
}

impl Session {
    fn start(role: &str) -> Session {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let (out, kept) = (slave.try_clone().unwrap(), slave.try_clone().unwrap());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--quiet"])
            .env(ROLE, role)
            .stdin(Stdio::from(slave))
            .stdout(Stdio::from(out))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut session = Session { master: File::from(master), child, seen: String::new(), _slave: kept };
        session.expect("ready");
        session
    }

    fn expect(&mut self, what: &str) {
        let mut bytes = [0; 256];
        while !self.seen.contains(what) {
            let n = self.master.read(&mut bytes).unwrap_or(0);
            assert!(n > 0, "the child ended without saying {what:?}: {:?}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
    }

    fn raw(&self) -> bool {
        !tcgetattr(&self.master).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    fn kill(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

#[test]
fn keys_reach_the_guest_and_the_escape_ends_it() {
    let mut session = Session::start("plain");
    assert!(session.raw());
    session.master.write_all(b"\x03").unwrap();
    session.expect("typed [3]");
    session.master.write_all(b"\x01x").unwrap();
    session.expect("quit");
    assert!(session.child.wait().unwrap().success());
    assert!(!session.raw());
}

#[test]
fn signals_put_it_back_and_still_end_the_process() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::ABORT] {
        let mut session = Session::start("plain");
        assert!(session.raw());
        session.kill(signal);
        assert_eq!(session.child.wait().unwrap().signal(), Some(signal.as_raw()));
        assert!(!session.raw(), "{signal:?}");
    }
}

/// What the tests above would see if nothing put it back.
#[test]
fn only_a_kill_leaves_it_raw() {
    let mut session = Session::start("plain");
    session.kill(Signal::KILL);
    session.child.wait().unwrap();
    assert!(session.raw());
}

#[test]
fn whoever_wants_to_know_of_a_termination_is_told() {
    let mut session = Session::start("asked");
    session.kill(Signal::TERM);
    session.expect("asked");
    assert!(session.child.wait().unwrap().success());
    assert!(!session.raw());
}

#[test]
fn a_panic_in_any_thread_puts_it_back() {
    let mut session = Session::start("panic");
    session.expect("panicked");
    assert!(!session.raw());
    session.kill(Signal::KILL);
    session.child.wait().unwrap();
}
