//! Events that threads signal to each other, and the one loop that waits for descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// How long a source that answered [`Next::Later`] is left alone at most.
const LATER: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// A counter that one thread raises and another waits for (an eventfd).
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// A new event, not signalled.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new() -> io::Result<Event> {
        Ok(Event(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Signals. Never blocks; signalling twice before anybody looks is as good as once.
    pub fn signal(&self) {
        // The one failure, a full counter, means that it is signalled.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes the signal; says whether there was one.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]) == Ok(8)
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a source wants after its handler ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Call again when the descriptor is readable.
    Keep,
    /// The same, but not at once: whoever takes the data has no room now.
    Later,
    /// Never again: the source is dropped.
    Remove,
}

type Handler = Box<dyn FnMut() -> Next + Send>;

struct Source {
    fd: Box<dyn AsFd + Send>,
    handler: Handler,
    later: bool,
}

struct Shared {
    wake: Event,
    added: Mutex<Vec<Source>>,
    stop: AtomicBool,
}

/// A way to add sources to an [`EventLoop`] from any thread.
#[derive(Clone)]
pub struct LoopHandle(Arc<Shared>);

impl LoopHandle {
    /// Calls `handler` on the loop's thread whenever `fd` is readable, closed, or in error, until it answers
    /// [`Next::Remove`]. Any kind of descriptor will do, regular files too (always readable).
    pub fn add(&self, fd: impl AsFd + Send + 'static, handler: impl FnMut() -> Next + Send + 'static) {
        let source = Source { fd: Box::new(fd), handler: Box::new(handler), later: false };
        self.0.added.lock().unwrap_or_else(PoisonError::into_inner).push(source);
        self.0.wake.signal();
    }
}

/// One thread that waits for descriptors and calls their handlers, one after the other. Dropping it stops
/// and joins the thread and drops all sources.
pub struct EventLoop {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the host has no descriptors or threads left.
    pub fn start() -> io::Result<EventLoop> {
        let shared = Arc::new(Shared {
            wake: Event::new()?,
            added: Mutex::new(Vec::new()),
            stop: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("events".into()).spawn(move || run(&of_thread))?;
        Ok(EventLoop { shared, thread: Some(thread) })
    }

    /// A way to add sources.
    #[must_use]
    pub fn handle(&self) -> LoopHandle {
        LoopHandle(Arc::clone(&self.shared))
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("The event loop panicked");
        }
    }
}

fn run(shared: &Shared) {
    let mut sources: Vec<Source> = Vec::new();
    while !shared.stop.load(Ordering::Acquire) {
        sources.append(&mut shared.added.lock().unwrap_or_else(PoisonError::into_inner));
        let ready = {
            let wanted = sources.iter().filter(|source| !source.later);
            let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
            fds.extend(wanted.map(|source| PollFd::from_borrowed_fd((*source.fd).as_fd(), PollFlags::IN)));
            let timeout = sources.iter().any(|source| source.later).then_some(&LATER);
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!("The event loop cannot wait any more: {error}");
                    return;
                }
            }
            fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<bool>>()
        };
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            shared.wake.take();
        }
        sources.retain_mut(|source| {
            if source.later {
                source.later = false;
                return true;
            }
            if ready.next() != Some(true) {
                return true;
            }
            let next = (source.handler)();
            source.later = next == Next::Later;
            next != Next::Remove
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::sync::{Arc, Mutex};

    use super::{Event, EventLoop, Next};

    #[test]
    fn handlers_run_when_signalled_until_removed() {
        let events = EventLoop::start().unwrap();
        let event = Arc::new(Event::new().unwrap());
        let (send, receive) = mpsc::channel();
        let (of_handler, mut count) = (Arc::clone(&event), 0);
        events.handle().add(Arc::clone(&event), move || {
            assert!(of_handler.take());
            count += 1;
            send.send(count).unwrap();
            if count == 2 { Next::Remove } else { Next::Keep }
        });
        event.signal();
        assert_eq!(receive.recv(), Ok(1));
        event.signal();
        assert_eq!(receive.recv(), Ok(2));
        assert!(receive.recv().is_err(), "the handler is dropped once removed");
        event.signal();
        drop(events);
        assert!(event.take(), "nobody took the third signal");
        assert!(!event.take());
    }

    #[test]
    fn a_source_without_room_is_asked_again_without_starving_others() {
        let events = EventLoop::start().unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&write, b"xy").unwrap();
        let read = Arc::new(read);
        let (tries, of_handler) = (Arc::new(Mutex::new(0)), Arc::clone(&read));
        let (send, receive) = mpsc::channel();
        let counted = Arc::clone(&tries);
        events.handle().add(read, move || {
            let mut tries = counted.lock().unwrap();
            *tries += 1;
            if *tries < 3 {
                return Next::Later;
            }
            let mut bytes = [0; 8];
            let n = rustix::io::read(&of_handler, &mut bytes).unwrap();
            send.send(bytes[..n].to_vec()).unwrap();
            Next::Remove
        });
        assert_eq!(receive.recv().unwrap(), b"xy");
        assert_eq!(*tries.lock().unwrap(), 3);
    }

    #[test]
    fn regular_files_are_always_ready() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let (send, receive) = mpsc::channel();
        let events = EventLoop::start().unwrap();
        events.handle().add(file, move || {
            send.send(()).unwrap();
            Next::Remove
        });
        receive.recv().unwrap();
    }
}
