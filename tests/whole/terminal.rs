//! On a terminal: a shell to type into, the way out, and the terminal as it was afterwards.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use wardian_tests::{Debian, Kernel};

use crate::or_skip;

/// The text without carriage returns and control sequences (ECMA-48, 5.4).
fn plain(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let first = parts.next().unwrap_or_default().to_owned();
    let all = parts.fold(first, |all, part| {
        all + part.trim_start_matches(|c| ('\x20'..'\x40').contains(&c)).get(1..).unwrap_or_default()
    });
    all.replace('\r', "")
}

/// A terminal with a Debian guest on it.
struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
    before: Termios,
    child: Child,
    screen: Arc<(Mutex<Vec<u8>>, Condvar)>,
}

impl Terminal {
    fn start(guest: Debian) -> Terminal {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("a terminal");
        let name = ptsname(&master, Vec::new()).expect("a terminal's name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).expect("a terminal");
        tcsetwinsize(&slave, Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).expect("a size");
        let before = tcgetattr(&slave).expect("a terminal");
        let other = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let mut command = guest.build().command();
        let child = command.stdin(other()).stdout(other()).stderr(other()).spawn().expect("wardian");
        let screen = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let (from, to) = (File::from(master.try_clone().expect("a descriptor")), Arc::clone(&screen));
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            // Ends with an error when the last slave is closed.
            while let Ok(n @ 1..) = std::io::Read::read(&mut &from, &mut chunk) {
                to.0.lock().expect("screen").extend_from_slice(&chunk[..n]);
                to.1.notify_all();
            }
        });
        Terminal { master, slave, before, child, screen }
    }

    fn text(&self) -> String {
        plain(&String::from_utf8_lossy(&self.screen.0.lock().expect("screen")))
    }

    /// Waits for `text` behind the first `from` bytes of the screen's text; where it ends.
    fn wait_for(&mut self, text: &str, from: usize) -> usize {
        let until = Instant::now() + Duration::from_secs(100);
        loop {
            let ended = self.child.try_wait().expect("a child");
            let all = self.text();
            if let Some(at) = all.get(from..).and_then(|rest| rest.find(text)) {
                return from + at + text.len();
            }
            assert!(
                ended.is_none() && Instant::now() < until,
                "no {text:?} ({ended:?}) on the screen:\n{all}"
            );
            let bytes = self.screen.0.lock().expect("screen");
            drop(self.screen.1.wait_timeout(bytes, Duration::from_millis(50)));
        }
    }

    fn type_text(&self, text: &str) {
        rustix::io::write(&self.master, text.as_bytes()).expect("the terminal takes input");
    }

    /// Waits for the end; the status, after a check that the terminal is as it was.
    fn end(mut self) -> Option<i32> {
        let until = Instant::now() + Duration::from_secs(60);
        let status = loop {
            match self.child.try_wait().expect("a child") {
                Some(status) => break status,
                None => assert!(Instant::now() < until, "no end; the screen:\n{}", self.text()),
            }
            thread::sleep(Duration::from_millis(10));
        };
        let (was, is) = (&self.before, tcgetattr(&self.slave).expect("a terminal"));
        assert_eq!(format!("{is:?}"), format!("{was:?}"), "the terminal is as it was");
        status.code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PROMPT: &str = "root@wardian:~# ";

#[test]
fn shell_answers_and_powers_off() {
    let mut terminal = Terminal::start(or_skip!(Debian::shell(Kernel::Cloud)).args(&["--cpus", "2"]));
    let at = terminal.wait_for(PROMPT, 0);
    assert_eq!(plain("\x1b[?2004ha\r\n\x1b[K\x1b[1;32mb"), "a\nb");
    let raw = tcgetattr(&terminal.slave).expect("a terminal");
    assert!(
        !raw.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG),
        "raw mode"
    );
    // Typed as a user does, with a correction.
    terminal.type_text("echo $((6 * 9\x7f7)) at $(tty)\r");
    let at = terminal.wait_for("\n42 at /dev/ttyS0\n", at);
    let at = terminal.wait_for(PROMPT, at);
    // Ctrl-C is the guest's.
    terminal.type_text("sleep 1000\r");
    let at = terminal.wait_for("sleep 1000\n", at);
    thread::sleep(Duration::from_millis(300));
    terminal.type_text("\x03");
    let at = terminal.wait_for(PROMPT, at);
    terminal.type_text("echo status $?\r");
    let at = terminal.wait_for("\nstatus 130\n", at);
    // Much at once, as when something is pasted.
    let words: String = (0..120).map(|n| format!("w{n} ")).collect();
    terminal.type_text(&format!("echo {words}| wc -w; echo {words}| md5sum\r"));
    let at = terminal.wait_for("\n120\n", at);
    let at = terminal.wait_for(PROMPT, at);
    terminal.type_text("poweroff\r");
    terminal.wait_for("Power down", at);
    assert_eq!(terminal.end(), Some(0));
}

#[test]
fn escape_ends_the_machine() {
    let mut terminal = Terminal::start(or_skip!(Debian::shell(Kernel::Cloud)));
    let at = terminal.wait_for(PROMPT, 0);
    // Ctrl-a Ctrl-a is one Ctrl-a for the guest: to the line's begin.
    terminal.type_text("cho begin\x01\x01e\r");
    terminal.wait_for("\nbegin\n", at);
    terminal.type_text("\x01x");
    assert_eq!(terminal.end(), Some(12));
}

#[test]
fn terminal_is_restored_when_the_machine_is_killed_by_a_signal() {
    let mut terminal = Terminal::start(or_skip!(Debian::shell(Kernel::Cloud)));
    terminal.wait_for("Linux version", 0);
    let id = terminal.child.id().to_string();
    wardian_tests::output(std::process::Command::new("kill").args(["-HUP", &id])).expect("kill");
    assert_eq!(terminal.end(), Some(12));
    assert!(Path::new("/dev/pts").is_dir());
}
