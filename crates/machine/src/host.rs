//! The host's side that outlives a reset: outputs, the terminal, signals.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, Once, PoisonError, Weak};
use std::thread::JoinHandle;

use wardian_backend::{Event, EventLoop, Next, Output, Terminal};

use crate::config::{Endpoint, Plan};
use crate::control::Control;
use crate::ending::{End, Ending};
use crate::error::MachineError;

/// Takes typed bytes for the guest, as many as it has room for.
pub(crate) type Input = Box<dyn FnMut(&[u8]) -> usize + Send>;

/// Where typed bytes go in the present life of the machine.
#[derive(Clone, Default)]
pub(crate) struct InputRoute(Arc<Mutex<Option<Input>>>);

impl InputRoute {
    /// From now on typed bytes go to `input`.
    pub(crate) fn set(&self, input: Option<Input>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = input;
    }

    /// Offers bytes; says how many were taken.
    fn offer(&self, bytes: &[u8]) -> usize {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(input) => input(bytes),
            None => 0,
        }
    }
}

/// Gets what the guest prints on the terminal. Called on the thread that writes it; must not wait for long.
pub type Screen = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// Where the machine's terminal ("stdio") is.
#[derive(Clone, Default)]
pub struct Seat {
    /// Not at the process's standard streams: standard input is left alone, nothing is printed.
    pub detached: bool,
    /// Who else sees what is printed.
    pub screen: Option<Screen>,
}

impl Seat {
    fn output(&self) -> std::io::Result<Output> {
        match (&self.screen, self.detached) {
            (None, true) => Output::null(),
            (None, false) => Output::stdout(),
            (Some(screen), detached) => {
                let stdout =
                    (!detached).then(|| std::io::stdout().as_fd().try_clone_to_owned()).transpose()?;
                Output::new("stdout", Split { stdout: stdout.map(File::from), screen: Arc::clone(screen) })
            }
        }
    }
}

/// Standard output, as long as it takes anything, and a screen.
struct Split {
    stdout: Option<File>,
    screen: Screen,
}

impl Write for Split {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = match self.stdout.as_mut().map(|stdout| stdout.write(bytes)) {
            None => bytes.len(),
            Some(Ok(taken @ 1..)) => taken,
            // The thread behind the output comes again.
            Some(Err(error)) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
                return Err(error);
            }
            Some(failed) => {
                if let Err(error) = failed
                    && error.kind() != ErrorKind::BrokenPipe
                {
                    tracing::error!("Standard output failed and is given up: {error}");
                }
                self.stdout = None;
                bytes.len()
            }
        };
        (self.screen)(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Types on the machine's terminal.
#[derive(Clone)]
pub struct Keyboard(pub(crate) InputRoute);

impl Keyboard {
    /// Offers bytes; says how many the guest had room for.
    #[must_use]
    pub fn offer(&self, bytes: &[u8]) -> usize {
        self.0.offer(bytes)
    }
}

/// Where the guest's character devices print.
#[derive(Clone)]
pub(crate) struct Outputs {
    pub(crate) serial: Output,
    pub(crate) console: Output,
    pub(crate) debug: Output,
    /// Where there is a doorbell.
    pub(crate) doorbell: Option<Output>,
    /// Where taken interrupts are written down.
    pub(crate) interrupts: Option<Output>,
}

impl Outputs {
    /// Opens them; files are created or emptied.
    pub(crate) fn open(plan: &Plan, seat: &Seat) -> Result<Outputs, MachineError> {
        let host = |source| MachineError::Host { what: "an output thread", source: Box::new(source) };
        let mut stdout = None;
        let file = |path: &PathBuf| {
            Output::file(path).map_err(|source| MachineError::Output { path: path.clone(), source })
        };
        let mut open = |endpoint: &Endpoint| match endpoint {
            Endpoint::None => Output::null().map_err(host),
            Endpoint::File(path) => file(path),
            Endpoint::Stdio => match &stdout {
                Some(shared) => Ok(Output::clone(shared)),
                None => Ok(stdout.insert(seat.output().map_err(host)?).clone()),
            },
        };
        Ok(Outputs {
            serial: open(&plan.serial)?,
            console: open(&plan.console)?,
            debug: open(&plan.debug_console)?,
            doorbell: plan.doorbell.as_ref().map(file).transpose()?,
            interrupts: plan.trace_interrupts.as_ref().map(file).transpose()?,
        })
    }

    /// Waits until everything is written.
    pub(crate) fn drain(&self) {
        let devices = [&self.serial, &self.console, &self.debug];
        for output in devices.into_iter().chain(&self.doorbell).chain(&self.interrupts) {
            output.drain();
        }
    }
}

/// The machines of this process that run.
static RUNNING: Mutex<Vec<Weak<Ending>>> = Mutex::new(Vec::new());

/// From now on a panic in any thread, devices' workers and the event loop included, ends `ending`'s machine.
fn watch_panics(ending: &Arc<Ending>) {
    static ONCE: Once = Once::new();
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.retain(|other| other.strong_count() > 0);
    running.push(Arc::downgrade(ending));
    drop(running);
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            before(info);
            let thread = std::thread::current().name().unwrap_or("without a name").to_owned();
            let text = info.payload_as_str().unwrap_or("no message").to_owned();
            let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
            for ending in running.iter().filter_map(Weak::upgrade) {
                ending.request(End::Panic(thread.clone(), text.clone()));
            }
        }));
    });
}

/// Standard input and signals, while the machine runs. Dropping it gives the terminal back.
pub(crate) struct Attached {
    // Dropped first: raw mode ends even if the loop hangs in a handler.
    _terminal: Option<Terminal>,
    _events: EventLoop,
    _pauser: Option<Pauser>,
}

/// A thread that pauses the machine and lets it go on: a pause waits for disks, the event loop must not.
struct Pauser {
    /// Pause, go on, or end.
    asked: Sender<Option<bool>>,
    thread: Option<JoinHandle<()>>,
}

impl Pauser {
    fn start(control: Control) -> std::io::Result<Pauser> {
        let (asked, next) = channel();
        let thread = std::thread::Builder::new().name("pauser".into()).spawn(move || {
            while let Ok(Some(pause)) = next.recv() {
                if pause {
                    control.park();
                } else {
                    control.unpark(None);
                }
            }
        })?;
        Ok(Pauser { asked, thread: Some(thread) })
    }
}

impl Drop for Pauser {
    fn drop(&mut self) {
        let _ = self.asked.send(None);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Attached {
    /// Begins to read standard input, if `terminal`, and to mind signals.
    pub(crate) fn attach(
        terminal: bool,
        route: &InputRoute,
        ending: &Arc<Ending>,
        control: Control,
    ) -> Result<Attached, MachineError> {
        let host = |what: &'static str| move |source| MachineError::Host { what, source: Box::new(source) };
        watch_panics(ending);
        let events = EventLoop::start().map_err(host("an event loop"))?;
        let signal = Arc::new(Event::new().map_err(host("an event"))?);
        // Only the first machine of a process minds signals: there is one handler.
        if wardian_backend::on_terminate(Arc::clone(&signal)).is_ok() {
            let (asked, ending) = (Arc::clone(&signal), Arc::clone(ending));
            events.handle().add(signal, move || {
                asked.take();
                ending.request(End::Outside);
                Next::Keep
            });
        }
        let (pause, resume) =
            (Event::new().map_err(host("an event"))?, Event::new().map_err(host("an event"))?);
        let (pause, resume) = (Arc::new(pause), Arc::new(resume));
        let mut pauser = None;
        if wardian_backend::on_pause(Arc::clone(&pause), Arc::clone(&resume)).is_ok() {
            let asked = Pauser::start(control).map_err(host("a thread"))?;
            for (signal, pauses) in [(pause, true), (resume, false)] {
                let (event, asked) = (Arc::clone(&signal), asked.asked.clone());
                events.handle().add(signal, move || {
                    event.take();
                    // It has gone only when the machine has.
                    let _ = asked.send(Some(pauses));
                    Next::Keep
                });
            }
            pauser = Some(asked);
        }
        let terminal = if terminal {
            let (route, ending) = (route.clone(), Arc::clone(ending));
            let sink = Box::new(move |bytes: &[u8]| route.offer(bytes));
            let quit = move || ending.request(End::Outside);
            let attached = Terminal::attach(&events.handle(), sink, quit);
            Some(attached.map_err(|e| MachineError::Host { what: "the terminal", source: Box::new(e) })?)
        } else {
            None
        };
        Ok(Attached { _terminal: terminal, _events: events, _pauser: pauser })
    }
}

#[cfg(test)]
mod tests {
    use super::watch_panics;
    use crate::ending::{End, Ending};

    #[test]
    fn a_panic_in_any_thread_ends_the_machine() {
        let ending = Ending::new();
        watch_panics(&ending);
        let worker = std::thread::Builder::new().name("worker".into()).spawn(|| panic!("a worker's bug"));
        assert!(worker.unwrap().join().is_err());
        match ending.take() {
            Some(End::Panic(thread, message)) => {
                // Another test may panic on purpose at the same time.
                assert!((thread == "worker" && message == "a worker's bug") || message == "scripted");
            }
            other => panic!("{other:?}"),
        }
    }
}
