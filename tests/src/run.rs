//! One `wardian run`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use crate::program::wardian;

/// How long a machine may take on two busy cores if the test does not say.
const LIMIT: Duration = Duration::from_secs(150);

/// A command line for `wardian run`.
#[derive(Clone, Debug)]
pub struct Run {
    args: Vec<OsString>,
    limit: Duration,
    /// A disk that is made for this machine.
    keep: Option<Arc<NamedTempFile>>,
}

impl Default for Run {
    fn default() -> Run {
        Run { args: vec!["run".into()], limit: LIMIT, keep: None }
    }
}

impl Run {
    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Run {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets another time limit.
    #[must_use]
    pub fn limit(mut self, seconds: u64) -> Run {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Keeps a file until the machine has ended.
    pub(crate) fn keep(mut self, file: NamedTempFile) -> Run {
        self.keep = Some(Arc::new(file));
        self
    }

    /// The command, without its standard streams.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(wardian());
        command.args(&self.args);
        command
    }

    /// Starts it; its standard input stays empty until something is typed.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(&self) -> Running {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let (serial, stderr) = (Text::default(), Text::default());
        let readers = vec![
            serial.follow(child.stdout.take().expect("piped")),
            stderr.follow(child.stderr.take().expect("piped")),
        ];
        let until = Instant::now() + self.limit;
        Running { child, serial, stderr, readers, until, line: self.line(), _keep: self.keep.clone() }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If it does not end in time.
    #[must_use]
    pub fn run(&self) -> Ended {
        let mut running = self.start();
        drop(running.child.stdin.take());
        running.end()
    }

    /// As a user would type it, without the script, which is shown for itself.
    fn line(&self) -> String {
        let words: Vec<_> = self.args.iter().map(|arg| arg.to_string_lossy()).collect();
        words.join(" ")
    }
}

/// Text that arrives.
#[derive(Clone, Default)]
struct Text(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Text {
    fn follow(&self, mut from: impl Read + Send + 'static) -> JoinHandle<()> {
        let Text(shared) = self.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut chunk) {
                shared.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&chunk[..n]);
                shared.1.notify_all();
            }
        })
    }

    /// All until now, with plain line ends.
    fn get(&self) -> String {
        let bytes = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    fn wait(&self, time: Duration) {
        let bytes = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.1.wait_timeout(bytes, time));
    }
}

/// A machine that runs. Dropping it ends it.
pub struct Running {
    child: Child,
    serial: Text,
    stderr: Text,
    readers: Vec<JoinHandle<()>>,
    until: Instant,
    line: String,
    _keep: Option<Arc<NamedTempFile>>,
}

impl Running {
    /// Waits until `text` is on the serial console.
    ///
    /// # Panics
    /// If the machine ends before, or time is up.
    pub fn wait_for(&mut self, text: &str) {
        self.wait_until(&format!("{text:?} on the serial console"), |serial| serial.contains(text));
    }

    /// Waits until the serial log is as wanted.
    ///
    /// # Panics
    /// If the machine ends before, or time is up.
    pub fn wait_until(&mut self, what: &str, done: impl Fn(&str) -> bool) {
        loop {
            let ended = self.child.try_wait().expect("a child can be waited for");
            if done(&self.serial.get()) {
                return;
            }
            assert!(ended.is_none(), "the machine ended ({ended:?}) before {what}");
            assert!(Instant::now() < self.until, "time is up, without {what}");
            self.serial.wait(Duration::from_millis(50));
        }
    }

    /// Types on the serial console.
    ///
    /// # Panics
    /// If the machine does not take it.
    pub fn type_text(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("piped");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("the machine takes input");
    }

    /// The serial log until now.
    #[must_use]
    pub fn serial(&self) -> String {
        self.serial.get()
    }

    /// The process's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If it does not come in time.
    #[must_use]
    pub fn end(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(Instant::now() < self.until, "time is up, and the machine still runs");
            self.serial.wait(Duration::from_millis(20));
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        Ended { status, serial: self.serial.get(), stderr: self.stderr.get(), line: self.line.clone() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.readers.is_empty() {
            return; // ended
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            show(&self.line, &self.serial.get(), &self.stderr.get());
        }
    }
}

fn show(line: &str, serial: &str, stderr: &str) {
    eprintln!("---- wardian {line}\n---- serial log\n{serial}\n---- messages\n{stderr}\n----");
}

/// How a machine ended. If the test fails while it has this, it shows the logs.
pub struct Ended {
    status: ExitStatus,
    /// What was on the standard output, with plain line ends.
    pub serial: String,
    /// What was on the standard error.
    pub stderr: String,
    line: String,
}

impl Ended {
    /// Exit status, if no signal ended it.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The rest of the serial log's first line that begins with `name=`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn value(&self, name: &str) -> &str {
        self.serial
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_else(|| panic!("{name}= is not in the serial log"))
    }
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if std::thread::panicking() {
            show(&self.line, &self.serial, &self.stderr);
        }
    }
}
