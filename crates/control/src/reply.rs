//! Answers.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;

/// What is sent back.
pub(crate) type Reply = Response<BoxBody<Bytes, Infallible>>;

/// A request that is refused, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) status: StatusCode,
    pub(crate) why: String,
}

impl Fault {
    pub(crate) fn new(status: StatusCode, why: impl Into<String>) -> Fault {
        Fault { status, why: why.into() }
    }

    /// The request makes no sense.
    pub(crate) fn bad(why: impl Into<String>) -> Fault {
        Fault::new(StatusCode::BAD_REQUEST, why)
    }

    /// Not while the machine is as it is.
    pub(crate) fn conflict(why: impl Into<String>) -> Fault {
        Fault::new(StatusCode::CONFLICT, why)
    }
}

#[derive(Serialize)]
struct Refusal<'a> {
    error: &'a str,
}

impl From<Fault> for Reply {
    fn from(fault: Fault) -> Reply {
        json(fault.status, &Refusal { error: &fault.why })
    }
}

/// An answer with this content.
pub(crate) fn plain(kind: &'static str, content: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(content.into()).boxed());
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

/// An answer in JSON.
pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Reply {
    let mut reply = match serde_json::to_vec(value) {
        Ok(mut text) => {
            text.push(b'\n');
            plain("application/json", text)
        }
        // Only a map with keys that are no text: a bug of ours.
        Err(error) => {
            let mut reply = plain("text/plain", error.to_string());
            *reply.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            return reply;
        }
    };
    *reply.status_mut() = status;
    reply
}

/// It went well.
pub(crate) fn ok(value: &impl Serialize) -> Result<Reply, Fault> {
    Ok(json(StatusCode::OK, value))
}
