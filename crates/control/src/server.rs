//! [`Server`]: the thread that listens at a machine's control socket.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::StatusCode;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Builder;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, watch};
use wardian_machine::{About, Control, Keyboard, Machine, Outcome};

use crate::desk::Desk;
use crate::io::Impatient;
use crate::place::{Claim, Directory, PlaceError};
use crate::reply::Fault;
use crate::router;

/// Connections at a time.
pub(crate) const CONNECTIONS: usize = 64;
/// Answers that go on (events, consoles, waits) at a time: fewer, so that there is always room for a question.
pub(crate) const STREAMS: usize = 48;
/// Threads for what may wait.
const BESIDE: usize = 4;
/// Bytes of a request's head, and lines in it.
const HEAD: usize = 16 << 10;
const HEADERS: usize = 64;
/// How long a head may take, the time between requests counted in.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// How long a client may take nothing of an answer.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// How long a machine that has ended waits for its clients to read that.
const FAREWELL: Duration = Duration::from_secs(1);

/// A control socket that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket.
    #[error("Could not open the control socket")]
    Place(#[from] PlaceError),
    /// A thread, or what it waits with.
    #[error("The host refuses a thread for the control socket")]
    Thread(#[source] io::Error),
}

/// How the machine has ended.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct End {
    /// The process status.
    status: u8,
    /// In words.
    text: String,
}

/// Has a value once the machine has ended.
pub(crate) type Ended = watch::Receiver<Option<End>>;

/// Waits until the machine has ended.
pub(crate) async fn over(ended: &mut Ended) {
    // If nobody is left to say so, it has.
    let _ = ended.wait_for(Option::is_some).await;
}

/// What requests are answered from.
pub(crate) struct Host {
    pub(crate) about: About,
    pub(crate) control: Control,
    pub(crate) keyboard: Option<Keyboard>,
    pub(crate) desk: Desk,
    pub(crate) engine: String,
    pub(crate) started: u64,
    pub(crate) socket: PathBuf,
    pub(crate) ended: Ended,
    pub(crate) streams: Arc<Semaphore>,
    /// Whose turn it is to pause the machine or let it go on.
    pub(crate) turn: Arc<Mutex<()>>,
}

impl Host {
    /// Does what may wait on another thread. It is done even if the client goes meanwhile.
    pub(crate) async fn beside<T: Send + 'static>(
        &self,
        what: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Fault> {
        let done = tokio::task::spawn_blocking(what).await;
        done.map_err(|error| Fault::new(StatusCode::INTERNAL_SERVER_ERROR, format!("It broke off: {error}")))
    }
}

/// A machine's control socket. [`Server::close`] says goodbye; dropping it does so without a word.
pub struct Server {
    claim: Option<Claim>,
    end: watch::Sender<Option<End>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(desk: Desk, machine: &Machine, directory: &Directory) -> Result<Server, ServerError> {
        let about = machine.about().clone();
        let (claim, listener) = directory.claim(&about.name)?;
        let (end, ended) = watch::channel(None);
        let host = Arc::new(Host {
            about,
            control: machine.control(),
            keyboard: machine.keyboard(),
            desk,
            engine: machine.engine_reason().to_owned(),
            started: wardian_time::host_wall().0,
            socket: claim.path().to_owned(),
            ended,
            streams: Arc::new(Semaphore::new(STREAMS)),
            turn: Arc::default(),
        });
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BESIDE)
            .thread_name("control:beside")
            .build()
            .map_err(ServerError::Thread)?;
        let listener = {
            let _inside = runtime.enter();
            UnixListener::from_std(listener).map_err(ServerError::Thread)?
        };
        let serve = move || {
            runtime.block_on(serve(listener, host));
            // Not waited for: a pause may hang at a stuck disk.
            runtime.shutdown_background();
        };
        let thread =
            std::thread::Builder::new().name("control".into()).spawn(serve).map_err(ServerError::Thread)?;
        Ok(Server { claim: Some(claim), end, thread: Some(thread) })
    }

    /// Path of the socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.claim.as_ref().map(Claim::path)
    }

    /// The machine has ended so: whoever waits for that is told, the socket goes.
    pub fn close(mut self, outcome: &Outcome) {
        self.farewell(End { status: outcome.status(), text: outcome.to_string() });
    }

    fn farewell(&mut self, end: End) {
        // First the name, so that nobody comes any more.
        drop(self.claim.take());
        self.end.send_replace(Some(end));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.farewell(End { status: wardian_machine::status::ENGINE, text: "It broke off".to_owned() });
        }
    }
}

/// Accepts clients until the machine has ended and they have gone.
async fn serve(listener: UnixListener, host: Arc<Host>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut ended = host.ended.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = over(&mut ended) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Some(place) = admit(&stream, &places) {
                    tokio::spawn(connection(stream, Arc::clone(&host), place));
                }
            }
            Err(error) => {
                // Most likely out of descriptors: those who are there may give some back.
                tracing::warn!("Could not accept a client at the control socket: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let gone = async {
        let _ = places.acquire_many(CONNECTIONS as u32).await;
        let _ = host.streams.acquire_many(STREAMS as u32).await;
    };
    let _ = tokio::time::timeout(FAREWELL, gone).await;
}

/// A place for a client of this user (or root), if there is one; else it is told.
fn admit(stream: &UnixStream, places: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    let user = rustix::process::geteuid().as_raw();
    let refuse = |line: &[u8]| {
        // What does not fit into the socket's buffer is not waited for.
        let _ = stream.try_write(line);
    };
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == user || peer.uid() == 0) {
        refuse(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        return None;
    }
    let place = Arc::clone(places).try_acquire_owned().ok();
    if place.is_none() {
        refuse(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    place
}

async fn connection(stream: UnixStream, host: Arc<Host>, place: OwnedSemaphorePermit) {
    let mut ended = host.ended.clone();
    let service = service_fn(move |request| {
        let host = Arc::clone(&host);
        async move { Ok::<_, Infallible>(router::answer(host, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_header_size(HEAD)
        .max_headers(HEADERS)
        .max_buf_size(2 * HEAD)
        // That would read the host's clock.
        .auto_date_header(false)
        .serve_connection(TokioIo::new(Impatient::new(stream, WRITE_TIME)), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = over(&mut ended) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!("A client of the control socket: {error}");
    }
    drop(place);
}
