//! Bytes from the guest to the host: a buffer with a thread behind it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes that wait for a slow reader at most.
const CAPACITY: usize = 1 << 20;
/// How long a writer waits for room before bytes are dropped.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long the thread lets bytes gather before it writes them: a guest prints one at a time, and a host
/// call and a thread switch for each would cost it dearly.
const GATHER: Duration = Duration::from_millis(1);
/// As many bytes are worth a host call at once.
const ENOUGH: usize = 4096;
/// How long to leave a descriptor alone that somebody has made non-blocking and that is full.
const RETRY: Duration = Duration::from_millis(2);

#[derive(Default)]
struct State {
    buffer: VecDeque<u8>,
    /// The thread is writing bytes that are no longer in `buffer`.
    busy: bool,
    /// Out of patience: nobody waits again until there is room.
    dropping: bool,
    dropped: u64,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// The thread waits for bytes.
    filled: Condvar,
    /// Writers wait for room, flushers for the end.
    drained: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.filled.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A place for the guest's output: written by a thread of its own, so that a vCPU thread that prints does
/// not wait for a terminal. When 1 MiB waits and nothing moves for 100 ms, what comes next is dropped and
/// counted until there is room again. Cheap to clone; the last clone to go waits until all is written.
#[derive(Clone)]
pub struct Output {
    shared: Arc<Shared>,
    _worker: Arc<Worker>,
}

impl Output {
    /// Output to any writer, which only the thread uses. Its first error ends it: what comes later is
    /// taken and forgotten.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn new(name: &str, sink: impl Write + Send + 'static) -> io::Result<Output> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            filled: Condvar::new(),
            drained: Condvar::new(),
        });
        let (of_thread, label) = (Arc::clone(&shared), name.to_owned());
        let thread = std::thread::Builder::new()
            .name(format!("out:{name}").chars().take(15).collect())
            .spawn(move || drain(&of_thread, sink, &label))?;
        let worker = Worker { shared: Arc::clone(&shared), thread: Some(thread) };
        Ok(Output { shared, _worker: Arc::new(worker) })
    }

    /// The process's standard output.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn stdout() -> io::Result<Output> {
        // Not `io::stdout()`: that would buffer lines once more.
        Output::new("stdout", File::from(io::stdout().as_fd().try_clone_to_owned()?))
    }

    /// A file, created or emptied.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn file(path: &Path) -> io::Result<Output> {
        Output::new(&path.to_string_lossy(), File::create(path)?)
    }

    /// Nowhere.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn null() -> io::Result<Output> {
        Output::new("null", io::sink())
    }

    /// Takes bytes to write.
    pub fn send(&self, mut bytes: &[u8]) {
        let mut state = self.shared.state();
        while !bytes.is_empty() {
            let room = CAPACITY - state.buffer.len();
            if room == 0 {
                if !state.dropping {
                    let wait = self
                        .shared
                        .drained
                        .wait_timeout_while(state, PATIENCE, |state| state.buffer.len() == CAPACITY);
                    state = wait.unwrap_or_else(PoisonError::into_inner).0;
                    state.dropping = state.buffer.len() == CAPACITY;
                    if !state.dropping {
                        continue;
                    }
                }
                state.dropped += bytes.len() as u64;
                return;
            }
            state.dropping = false;
            if state.buffer.is_empty() {
                self.shared.filled.notify_one();
            }
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            state.buffer.extend(now);
            bytes = rest;
        }
    }

    /// Waits until everything sent before is written, as long as that takes. Not for vCPU threads.
    pub fn drain(&self) {
        let done = |state: &mut State| !state.buffer.is_empty() || state.busy;
        drop(self.shared.drained.wait_while(self.shared.state(), done));
    }

    /// Bytes that were dropped because nobody read.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.state().dropped
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(bytes);
        Ok(bytes.len())
    }

    /// Does nothing: see [`Output::drain`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.shared.state();
        f.debug_struct("Output")
            .field("waiting", &state.buffer.len())
            .field("dropped", &state.dropped)
            .finish_non_exhaustive()
    }
}

fn write_all(sink: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn drain(shared: &Shared, mut sink: impl Write, name: &str) {
    let mut failed = false;
    let mut state = shared.state();
    loop {
        if state.buffer.is_empty() {
            if state.closed {
                return;
            }
            state = shared.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            if state.closed || state.buffer.len() >= ENOUGH {
                continue;
            }
            let wait = shared.filled.wait_timeout_while(state, GATHER, |state| !state.closed);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        }
        let bytes = std::mem::take(&mut state.buffer);
        state.busy = true;
        drop(state);
        shared.drained.notify_all();
        if !failed {
            let (front, back) = bytes.as_slices();
            let result = write_all(&mut sink, front)
                .and_then(|()| write_all(&mut sink, back))
                .and_then(|()| sink.flush());
            if let Err(error) = result {
                failed = true;
                if error.kind() != io::ErrorKind::BrokenPipe {
                    tracing::error!("Output to {name} failed and is given up: {error}");
                }
            }
        }
        state = shared.state();
        state.busy = false;
        shared.drained.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::{CAPACITY, Output};

    /// Blocks in every write until told to go on.
    struct Gate(Receiver<()>, SyncSender<usize>);
    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.1.send(bytes.len());
            let _ = self.0.recv();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_file_has_everything_once_the_last_clone_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial.log");
        let output = Output::file(&path).unwrap();
        let mut clone = output.clone();
        for n in 0..1000 {
            writeln!(clone, "line {n}").unwrap();
        }
        drop((output, clone));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1000);
        assert!(text.ends_with("line 999\n"));
    }

    #[test]
    fn a_stuck_reader_costs_bytes_but_not_time_without_bound() {
        let (go, wait) = sync_channel(0);
        let (told, tell) = sync_channel(16);
        let output = Output::new("stuck", Gate(wait, told)).unwrap();
        output.send(b"x");
        assert_eq!(tell.recv(), Ok(1), "the thread now hangs in a write");
        output.send(&vec![0; CAPACITY]);
        for _ in 0..1000 {
            output.send(&[1; 10]);
        }
        assert_eq!(output.dropped(), 10_000);
        drop(go);
        output.drain();
        output.send(b"back");
        output.drain();
        assert_eq!(output.dropped(), 10_000);
    }

    #[test]
    fn single_bytes_are_written_together() {
        let (go, wait) = sync_channel(16);
        let (told, tell) = sync_channel(5000);
        let output = Output::new("gather", Gate(wait, told)).unwrap();
        drop(go);
        for _ in 0..2000 {
            output.send(b"x");
        }
        output.drain();
        drop(output);
        let writes: Vec<usize> = tell.iter().collect();
        assert_eq!(writes.iter().sum::<usize>(), 2000);
        assert!(writes.len() < 200, "{} writes", writes.len());
    }

    #[test]
    fn a_full_nonblocking_pipe_is_waited_for() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::fs::fcntl_setfl(&write, rustix::fs::OFlags::NONBLOCK).unwrap();
        let output = Output::new("pipe", std::fs::File::from(write)).unwrap();
        output.send(&vec![b'z'; 300_000]);
        let reader =
            std::thread::spawn(move || io::copy(&mut std::fs::File::from(read), &mut io::sink()).unwrap());
        drop(output);
        assert_eq!(reader.join().unwrap(), 300_000);
    }

    #[test]
    fn a_broken_pipe_is_no_trouble() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(read);
        let output = Output::new("broken", std::fs::File::from(write)).unwrap();
        output.send(b"x");
        output.drain();
        output.send(b"y");
        output.drain();
    }
}
