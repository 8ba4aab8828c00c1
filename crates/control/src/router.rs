//! Which request goes where: the table of routes, and the checks that all of them share.
//!
//! A new route: a line in [`ROUTES`], an [`Act`], its arm in [`act`], and its part of `openapi.json`. Tests hold the
//! table and the document together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, StatusCode};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;

use crate::reply::{Fault, Reply, plain};
use crate::server::Host;
use crate::{life, look, metrics, streams};

/// Bytes of a request's body at most.
pub(crate) const MAX_BODY: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(10);

/// What a route's requests bring along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Brings {
    Nothing,
    /// A JSON object, or nothing.
    Json,
    /// Any bytes.
    Bytes,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Document,
    Info,
    Stats,
    Metrics,
    Inspect,
    Vcpus,
    Vcpu,
    Memory,
    MemoryAt,
    Events,
    Wait,
    Console,
    Type,
    Pause,
    Resume,
    Stop,
    Reset,
    Nmi,
}

/// One thing that can be asked.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) method: Method,
    /// Its path; `{name}` is any one part, `{name}` at the end of [`Act::Inspect`] all that follow.
    pub(crate) path: &'static str,
    pub(crate) act: Act,
    pub(crate) brings: Brings,
    /// Names of the parameters that it takes behind the question mark.
    pub(crate) query: &'static [&'static str],
}

const fn get(path: &'static str, act: Act, query: &'static [&'static str]) -> Route {
    Route { method: Method::GET, path, act, brings: Brings::Nothing, query }
}

const fn post(path: &'static str, act: Act, brings: Brings) -> Route {
    Route { method: Method::POST, path, act, brings, query: &[] }
}

/// Everything that can be asked.
pub(crate) static ROUTES: [Route; 19] = [
    get("/openapi.json", Act::Document, &[]),
    get("/info", Act::Info, &[]),
    get("/stats", Act::Stats, &[]),
    get("/metrics", Act::Metrics, &[]),
    get("/inspect", Act::Inspect, &[]),
    get("/inspect/{path}", Act::Inspect, &[]),
    get("/vcpus", Act::Vcpus, &[]),
    get("/vcpus/{index}", Act::Vcpu, &[]),
    get("/memory", Act::Memory, &[]),
    get("/memory/{gpa}", Act::MemoryAt, &["size"]),
    get("/events", Act::Events, &["past", "follow"]),
    get("/wait", Act::Wait, &[]),
    get("/console", Act::Console, &["past"]),
    post("/console", Act::Type, Brings::Bytes),
    post("/pause", Act::Pause, Brings::Nothing),
    post("/resume", Act::Resume, Brings::Json),
    post("/stop", Act::Stop, Brings::Json),
    post("/reset", Act::Reset, Brings::Nothing),
    post("/nmi", Act::Nmi, Brings::Json),
];

/// What a request asks, checked and complete.
#[derive(Debug)]
pub(crate) struct Asked {
    /// What stands for the `{name}` of its path.
    pub(crate) arg: String,
    pub(crate) query: BTreeMap<String, String>,
    pub(crate) body: Bytes,
    /// The protocol that the client wants to go on with, and how.
    pub(crate) upgrade: Option<(String, hyper::upgrade::OnUpgrade)>,
}

impl Asked {
    /// The body as JSON; the default if there is none.
    pub(crate) fn json<T: DeserializeOwned + Default>(&self) -> Result<T, Fault> {
        if self.body.is_empty() {
            return Ok(T::default());
        }
        serde_json::from_slice(&self.body)
            .map_err(|error| Fault::bad(format!("The body makes no sense: {error}")))
    }

    /// A parameter from behind the question mark.
    pub(crate) fn param<T: std::str::FromStr>(&self, name: &str, wanted: &str) -> Result<Option<T>, Fault> {
        let parse = |text: &String| {
            text.parse().map_err(|_| Fault::bad(format!("Parameter {name} is '{text}': give {wanted}")))
        };
        self.query.get(name).map(parse).transpose()
    }
}

/// What `pattern` finds in `path`: the part for its `{name}`, or nothing if there is none in it.
fn matches(pattern: &str, path: &str) -> Option<String> {
    let Some((fixed, _)) = pattern.split_once('{') else {
        return (pattern == path).then(String::new);
    };
    let rest = path.strip_prefix(fixed).filter(|rest| !rest.is_empty())?;
    let rest = percent_decode_str(rest).decode_utf8().ok()?;
    // Only a tree has paths in it.
    (fixed == "/inspect/" || !rest.contains('/')).then(|| rest.into_owned())
}

/// The route for `method` and `path`, and what its `{name}` stands for.
pub(crate) fn find(method: &Method, path: &str) -> Result<(&'static Route, String), (Fault, Vec<Method>)> {
    let here: Vec<_> =
        ROUTES.iter().filter_map(|route| matches(route.path, path).map(|arg| (route, arg))).collect();
    let allowed: Vec<Method> = here.iter().map(|(route, _)| route.method.clone()).collect();
    if allowed.is_empty() {
        let why = format!("There is no {path}: GET /openapi.json says what there is");
        return Err((Fault::new(StatusCode::NOT_FOUND, why), allowed));
    }
    here.into_iter().find(|(route, _)| route.method == *method).ok_or_else(|| {
        let names: Vec<_> = allowed.iter().map(Method::as_str).collect();
        let why = format!("{path} takes {}, not {method}", names.join(" and "));
        (Fault::new(StatusCode::METHOD_NOT_ALLOWED, why), allowed)
    })
}

fn query(route: &Route, text: &str) -> Result<BTreeMap<String, String>, Fault> {
    let mut all = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(text.as_bytes()) {
        if !route.query.contains(&&*name) {
            return Err(Fault::bad(format!("{} has no parameter '{name}'", route.path)));
        }
        if all.insert(name.clone().into_owned(), value.into_owned()).is_some() {
            return Err(Fault::bad(format!("Parameter '{name}' is given twice")));
        }
    }
    Ok(all)
}

/// Checks what kind the body is of, before it is read.
fn check_kind(route: &Route, request: &Request<Incoming>) -> Result<(), Fault> {
    let there = !request.body().is_end_stream();
    if route.brings == Brings::Nothing && there {
        return Err(Fault::bad(format!("{} {} takes no body", route.method, route.path)));
    }
    let kind = request.headers().get(CONTENT_TYPE).map(HeaderValue::to_str);
    let is_json = |kind: &str| {
        let essence = kind.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json")
    };
    match kind {
        Some(kind)
            if there && route.brings == Brings::Json && !kind.as_ref().is_ok_and(|kind| is_json(kind)) =>
        {
            let why = format!("{} takes application/json, not {}", route.path, kind.unwrap_or("this"));
            Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why))
        }
        _ => Ok(()),
    }
}

async fn body(request: Request<Incoming>) -> Result<Bytes, Fault> {
    let whole = Limited::new(request.into_body(), MAX_BODY).collect();
    match tokio::time::timeout(BODY_TIME, whole).await {
        Ok(Ok(whole)) => Ok(whole.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let why = format!("The body is too large: {MAX_BODY} bytes are possible");
            Err(Fault::new(StatusCode::PAYLOAD_TOO_LARGE, why))
        }
        Ok(Err(error)) => Err(Fault::bad(format!("The body breaks off: {error}"))),
        Err(_) => Err(Fault::new(StatusCode::REQUEST_TIMEOUT, "The body does not arrive")),
    }
}

/// Answers one request.
pub(crate) async fn answer(host: Arc<Host>, request: Request<Incoming>) -> Reply {
    match find(request.method(), request.uri().path()) {
        Ok((route, arg)) => run(host, route, arg, request).await.unwrap_or_else(Reply::from),
        Err((fault, allowed)) => {
            let mut reply = Reply::from(fault);
            for method in allowed {
                if let Ok(value) = HeaderValue::from_str(method.as_str()) {
                    reply.headers_mut().append(ALLOW, value);
                }
            }
            reply
        }
    }
}

async fn run(
    host: Arc<Host>,
    route: &'static Route,
    arg: String,
    mut request: Request<Incoming>,
) -> Result<Reply, Fault> {
    let query = query(route, request.uri().query().unwrap_or_default())?;
    check_kind(route, &request)?;
    let protocol = request.headers().get(hyper::header::UPGRADE).and_then(|value| value.to_str().ok());
    let upgrade = protocol.map(str::to_owned).map(|protocol| (protocol, hyper::upgrade::on(&mut request)));
    let body = if route.brings == Brings::Nothing { Bytes::new() } else { body(request).await? };
    act(host, route.act, Asked { arg, query, body, upgrade }).await
}

async fn act(host: Arc<Host>, act: Act, asked: Asked) -> Result<Reply, Fault> {
    match act {
        Act::Document => Ok(plain("application/json", crate::OPENAPI)),
        Act::Info => look::info(&host),
        Act::Stats => look::stats(&host).await,
        Act::Metrics => metrics::metrics(&host).await,
        Act::Inspect => look::inspect(&host, asked).await,
        Act::Vcpus => look::vcpus(&host).await,
        Act::Vcpu => look::vcpu(&host, asked).await,
        Act::Memory => look::memory(&host),
        Act::MemoryAt => look::memory_at(&host, asked).await,
        Act::Events => streams::events(&host, &asked),
        Act::Wait => streams::wait(&host).await,
        Act::Console => streams::console(&host, asked),
        Act::Type => streams::type_text(&host, asked).await,
        Act::Pause => life::pause(&host).await,
        Act::Resume => life::resume(&host, &asked).await,
        Act::Stop => life::stop(&host, &asked),
        Act::Reset => life::reset(&host),
        Act::Nmi => life::nmi(&host, &asked),
    }
}

#[cfg(test)]
mod tests {
    use super::{Act, find};
    use hyper::{Method, StatusCode};

    #[test]
    fn paths_find_their_routes() {
        let found = |path: &str| find(&Method::GET, path).map(|(route, arg)| (route.act, arg)).ok();
        assert_eq!(found("/info"), Some((Act::Info, String::new())));
        assert_eq!(found("/inspect"), Some((Act::Inspect, String::new())));
        assert_eq!(
            found("/inspect/devices/pci/00%3A01.0"),
            Some((Act::Inspect, "devices/pci/00:01.0".into()))
        );
        assert_eq!(found("/vcpus/7"), Some((Act::Vcpu, "7".into())));
        for nothing in [
            "/",
            "",
            "/infos",
            "/info/",
            "//info",
            "/vcpus/",
            "/vcpus/1/2",
            "/vcpus/1%2f2",
            "/inspect/%ff",
            "*",
        ] {
            assert_eq!(found(nothing), None, "{nothing}");
        }
        let (fault, allowed) = find(&Method::DELETE, "/console").unwrap_err();
        assert_eq!(
            (fault.status, allowed),
            (StatusCode::METHOD_NOT_ALLOWED, vec![Method::GET, Method::POST])
        );
        assert_eq!(fault.why, "/console takes GET and POST, not DELETE");
    }
}
