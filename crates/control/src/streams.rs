//! Answers that go on: events, the end, the console.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Full};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, UPGRADE};
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use wardian_machine::Keyboard;

use crate::console::SCROLLBACK;
use crate::reply::{Fault, Reply, ok, plain};
use crate::router::Asked;
use crate::server::{Ended, Host, over};

/// What a client asks to upgrade to, to get the terminal's bytes both ways.
pub(crate) const PROTOCOL: &str = "wardian-console";
/// How soon bytes that the guest had no room for are offered again.
const AGAIN: Duration = Duration::from_millis(10);
/// Bytes that are kept for a guest that takes none.
const KEPT: usize = 4096;
/// How long what a viewer typed last is offered after it has gone.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long typed text is offered before it is given up.
const TYPING: Duration = Duration::from_secs(10);

/// A place among the answers that go on.
fn place(host: &Host) -> Result<OwnedSemaphorePermit, Fault> {
    let why = "Too many clients listen already";
    Arc::clone(&host.streams)
        .try_acquire_owned()
        .map_err(|_| Fault::new(StatusCode::SERVICE_UNAVAILABLE, why))
}

/// Sent where a listener was too slow.
#[derive(Serialize)]
struct Lost {
    event: &'static str,
    count: u64,
}

pub(crate) fn events(host: &Arc<Host>, asked: &Asked) -> Result<Reply, Fault> {
    let past = asked.param("past", "a number of events")?.unwrap_or(usize::MAX);
    let follow = asked.param("follow", "true or false")?.unwrap_or(true);
    let (past, news) = host.desk.events.listen(past);
    let kind = "application/x-ndjson";
    if !follow {
        return Ok(plain(kind, past.concat()));
    }
    let place = place(host)?;
    let (sender, body) = Channel::<Bytes, Infallible>::new(16);
    let ended = host.ended.clone();
    tokio::spawn(async move {
        let _ = pass_on(sender, past, news, ended).await;
        drop(place);
    });
    let mut reply = Response::new(body.boxed());
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(reply)
}

/// Sends events until the machine has ended or the client has gone (the error).
async fn pass_on(
    mut sender: Sender<Bytes, Infallible>,
    past: Vec<Bytes>,
    mut news: Receiver<Bytes>,
    mut ended: Ended,
) -> Result<(), http_body_util::channel::SendError> {
    for line in past {
        sender.send_data(line).await?;
    }
    loop {
        let next = tokio::select! {
            biased;
            next = news.recv() => next,
            () = over(&mut ended) => return Ok(()),
        };
        match next {
            Ok(line) => sender.send_data(line).await?,
            Err(RecvError::Lagged(count)) => {
                let mut line = serde_json::to_vec(&Lost { event: "lost", count }).unwrap_or_default();
                line.push(b'\n');
                sender.send_data(line.into()).await?;
            }
            Err(RecvError::Closed) => return Ok(()),
        }
    }
}

pub(crate) async fn wait(host: &Arc<Host>) -> Result<Reply, Fault> {
    let _place = place(host)?;
    let mut ended = host.ended.clone();
    over(&mut ended).await;
    let end = ended.borrow().clone();
    let why = "The machine's process ends without a word";
    ok(&end.ok_or_else(|| Fault::new(StatusCode::INTERNAL_SERVER_ERROR, why))?)
}

fn keyboard(host: &Host) -> Result<&Keyboard, Fault> {
    let why = "No device of the machine uses the terminal: its serial port and console go elsewhere";
    host.keyboard.as_ref().ok_or_else(|| Fault::conflict(why))
}

pub(crate) fn console(host: &Arc<Host>, asked: Asked) -> Result<Reply, Fault> {
    let past = asked.param("past", "a number of bytes")?.unwrap_or(SCROLLBACK);
    let keyboard = keyboard(host)?.clone();
    let (past, news) = host.desk.hub.watch(past);
    let Some((protocol, upgrade)) = asked.upgrade else {
        return Ok(plain("application/octet-stream", past));
    };
    if protocol != PROTOCOL {
        return Err(Fault::bad(format!("Can upgrade to {PROTOCOL}, not to {protocol}")));
    }
    let place = place(host)?;
    let ended = host.ended.clone();
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            let viewer = TokioIo::new(upgraded);
            let _ = serve_viewer(viewer, past, news, &keyboard, ended).await;
        }
        drop(place);
    });
    let mut reply = Response::new(Full::new(Bytes::new()).boxed());
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    reply.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    Ok(reply)
}

/// One viewer of the terminal, until it goes or the machine has ended.
async fn serve_viewer(
    viewer: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    past: Bytes,
    mut news: Receiver<Bytes>,
    keyboard: &Keyboard,
    mut ended: Ended,
) -> std::io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(viewer);
    writer.write_all(&past).await?;
    let typing = async {
        let (mut waiting, mut bytes) = (Vec::new(), [0; 1024]);
        loop {
            tokio::select! {
                count = reader.read(&mut bytes), if waiting.len() < KEPT => match count? {
                    0 => break,
                    count => waiting.extend_from_slice(&bytes[..count]),
                },
                () = tokio::time::sleep(AGAIN), if !waiting.is_empty() => {}
            }
            let taken = keyboard.offer(&waiting).min(waiting.len());
            waiting.drain(..taken);
        }
        // What was sent before the viewer left.
        let _ = tokio::time::timeout(LAST_WORDS, offer(keyboard, &waiting)).await;
        std::io::Result::Ok(())
    };
    let watching = async {
        loop {
            let next = tokio::select! {
                biased;
                next = news.recv() => next,
                () = over(&mut ended) => return writer.shutdown().await,
            };
            match next {
                Ok(bytes) => writer.write_all(&bytes).await?,
                Err(RecvError::Lagged(_)) => writer.write_all(b"\r\n[output was lost here]\r\n").await?,
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    };
    tokio::select! { result = typing => result, result = watching => result }
}

/// Types, as fast as the guest takes it.
async fn offer(keyboard: &Keyboard, mut bytes: &[u8]) {
    loop {
        let taken = keyboard.offer(bytes).min(bytes.len());
        bytes = &bytes[taken..];
        if bytes.is_empty() {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

pub(crate) async fn type_text(host: &Arc<Host>, asked: Asked) -> Result<Reply, Fault> {
    #[derive(Serialize)]
    struct Typed {
        typed: usize,
    }
    let keyboard = keyboard(host)?;
    let _place = place(host)?;
    let offered = tokio::time::timeout(TYPING, offer(keyboard, &asked.body)).await;
    offered.map_err(|_| Fault::new(StatusCode::GATEWAY_TIMEOUT, "The guest does not take what is typed"))?;
    ok(&Typed { typed: asked.body.len() })
}
