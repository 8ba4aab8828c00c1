//! [`Client`]: calls a machine's control socket.

use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::PathBuf;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use crate::place::{Directory, PlaceError};
use crate::streams::PROTOCOL;

/// Bytes of an answer at most; `/inspect` and `/vcpus` of 64 vCPUs need some.
const MAX_ANSWER: usize = 64 << 20;

/// A machine that cannot be asked, or does not want to.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The directory of the sockets.
    #[error("Could not look for machines")]
    Place(#[from] PlaceError),
    /// No machine has the name.
    #[error("No machine named {0} runs")]
    NoMachine(String),
    /// The connection.
    #[error("Could not talk to machine {name}")]
    Connection {
        /// Its name.
        name: String,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("Machine {0} does not answer")]
    Silent(String),
    /// The machine refused, and said why.
    #[error("Machine {name} refused: {why}")]
    Refused {
        /// Its name.
        name: String,
        /// The status of the answer.
        status: u16,
        /// What it says.
        why: String,
    },
}

/// A caller of one machine. Each call is a connection of its own.
pub struct Client {
    name: String,
    path: PathBuf,
    runtime: Runtime,
    patience: Duration,
}

impl Client {
    /// A caller of machine `name`. A socket that is left of a dead one is removed.
    ///
    /// # Errors
    /// When there is no such machine.
    pub fn find(directory: &Directory, name: &str) -> Result<Client, ClientError> {
        // A name with a slash would lead out of the directory.
        if name.contains('/') || !directory.is_alive(name)? {
            return Err(ClientError::NoMachine(name.to_owned()));
        }
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|source| ClientError::Connection { name: name.to_owned(), source })?;
        let path = directory.socket(name);
        Ok(Client { name: name.to_owned(), path, runtime, patience: Duration::from_secs(30) })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits so long for an answer, 30 seconds if this is not called.
    #[must_use]
    pub fn patient_for(mut self, patience: Duration) -> Client {
        self.patience = patience;
        self
    }

    fn broken(&self, error: impl std::error::Error + Send + Sync + 'static) -> ClientError {
        ClientError::Connection { name: self.name.clone(), source: io::Error::other(error) }
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let lost = |source| ClientError::Connection { name: self.name.clone(), source };
        let stream = UnixStream::connect(&self.path).await.map_err(lost)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!("The connection to a machine: {error}");
            }
        });
        sender.send_request(request).await.map_err(|error| self.broken(error))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let text = body.map(ToString::to_string).unwrap_or_default();
        let mut request = Request::new(Full::new(Bytes::from(text)));
        *request.method_mut() = method;
        *request.uri_mut() = path.parse::<hyper::Uri>().map_err(|error| self.broken(error))?;
        request.headers_mut().insert(HOST, HeaderValue::from_static("wardian"));
        if body.is_some() {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        Ok(request)
    }

    async fn whole(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let status = response.status();
        let limited = http_body_util::Limited::new(response.into_body(), MAX_ANSWER);
        let body = limited.collect().await.map_err(|error| ClientError::Connection {
            name: self.name.clone(),
            source: io::Error::other(error),
        })?;
        let body = body.to_bytes();
        if status.is_success() { Ok(body) } else { Err(self.refusal(status, &body)) }
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        let value: Option<Value> = serde_json::from_slice(body).ok();
        let why = value.as_ref().and_then(|value| value["error"].as_str());
        let why = why.map_or_else(|| status.to_string(), str::to_owned);
        ClientError::Refused { name: self.name.clone(), status: status.as_u16(), why }
    }

    /// Asks, and gives the whole answer.
    ///
    /// # Errors
    /// When the machine cannot be reached, does not answer in time, or refuses.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Bytes, ClientError> {
        let method = Method::from_bytes(method.as_bytes()).map_err(|error| self.broken(error))?;
        let request = self.request(method, path, body)?;
        let whole = async { self.whole(self.send(request).await?).await };
        let timed = self.runtime.block_on(async { tokio::time::timeout(self.patience, whole).await });
        timed.map_err(|_| ClientError::Silent(self.name.clone()))?
    }

    /// Asks for JSON.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.value(&self.call("GET", path, None)?)
    }

    /// Wants something done.
    ///
    /// # Errors
    /// See [`Client::call`].
    pub fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        self.value(&self.call("POST", path, body)?)
    }

    fn value(&self, body: &[u8]) -> Result<Value, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.broken(error))
    }

    /// Waits for the machine's end: its status and what it was. `None`: it did not end in time.
    ///
    /// # Errors
    /// When the machine cannot be reached.
    pub fn wait(&self, limit: Option<Duration>) -> Result<Option<Value>, ClientError> {
        let request = self.request(Method::GET, "/wait", None)?;
        let whole = async { self.whole(self.send(request).await?).await };
        let body = self.runtime.block_on(async {
            match limit {
                Some(limit) => tokio::time::timeout(limit, whole).await.ok(),
                None => Some(whole.await),
            }
        });
        body.map(|body| self.value(&body?)).transpose()
    }

    /// Gives each line of an answer to `each` as it comes, until that says false or the machine has ended.
    ///
    /// # Errors
    /// When the machine cannot be reached or refuses.
    pub fn lines(&self, path: &str, mut each: impl FnMut(&[u8]) -> bool) -> Result<(), ClientError> {
        let request = self.request(Method::GET, path, None)?;
        self.runtime.block_on(async {
            let response = self.send(request).await?;
            if !response.status().is_success() {
                return self.whole(response).await.map(drop);
            }
            let mut body = response.into_body();
            let mut waiting = BytesMut::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|error| self.broken(error))?;
                waiting.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()));
                while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                    if !each(&waiting.split_to(end + 1)[..end]) {
                        return Ok(());
                    }
                }
            }
            Ok(())
        })
    }

    /// The machine's terminal as a stream of bytes both ways, which begins with the last `past` bytes; and what has
    /// already come of it.
    ///
    /// # Errors
    /// When the machine cannot be reached or refuses.
    pub fn console(&self, past: usize) -> Result<(StdStream, Bytes), ClientError> {
        let mut request = self.request(Method::GET, &format!("/console?past={past}"), None)?;
        request.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        self.runtime.block_on(async {
            let response = self.send(request).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let status = response.status();
                let body = self.whole(response).await?;
                return Err(self.refusal(status, &body));
            }
            let upgraded = hyper::upgrade::on(response).await.map_err(|error| self.broken(error))?;
            let lost = |source| ClientError::Connection { name: self.name.clone(), source };
            let parts = upgraded
                .downcast::<TokioIo<UnixStream>>()
                .map_err(|_| lost(io::Error::other("the connection is no socket")))?;
            let stream = parts.io.into_inner().into_std().map_err(lost)?;
            stream.set_nonblocking(false).map_err(lost)?;
            Ok((stream, parts.read_buf))
        })
    }
}
