//! The OpenAPI document and the socket say the same.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Case, SLEEPS};
use crate::OPENAPI;
use crate::router::{Brings, ROUTES};

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

/// What `schema` stands for, if it is a reference.
fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(path) => document.pointer(path.trim_start_matches('#')).unwrap_or_else(|| panic!("no {path}")),
        None => schema,
    }
}

/// Whether `value` is as `schema` says: the part of JSON Schema that the document uses, and nothing but that.
fn check(document: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let schema = resolve(document, schema);
    let known = [
        "type",
        "description",
        "enum",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "minItems",
        "maxItems",
        "minimum",
        "oneOf",
    ];
    let rules = schema.as_object().ok_or("a schema is an object")?;
    assert!(rules.keys().all(|rule| known.contains(&rule.as_str())), "{rules:?}");
    let fail = |why: &str| Err(format!("{at}: {why}: {value}"));
    if let Some(choices) = schema["oneOf"].as_array() {
        let fitting = choices.iter().filter(|choice| check(document, choice, value, at).is_ok()).count();
        return if fitting == 1 { Ok(()) } else { fail("fits not one choice") };
    }
    let types = match &schema["type"] {
        Value::String(one) => vec![one.as_str()],
        Value::Array(some) => some.iter().filter_map(Value::as_str).collect(),
        _ => return fail("the schema has no type"),
    };
    let is = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if !types.contains(&is) {
        return fail("the wrong type");
    }
    if schema["enum"].as_array().is_some_and(|choices| !choices.contains(value)) {
        return fail("not in the list");
    }
    if schema["minimum"].as_i64().is_some_and(|least| value.as_i64().is_some_and(|value| value < least)) {
        return fail("too small");
    }
    if let Some(all) = value.as_array() {
        let len = all.len() as u64;
        if schema["minItems"].as_u64().is_some_and(|least| len < least)
            || schema["maxItems"].as_u64().is_some_and(|most| len > most)
        {
            return fail("the wrong length");
        }
        for (n, item) in all.iter().enumerate() {
            check(document, &schema["items"], item, &format!("{at}/{n}"))?;
        }
    }
    let Some(all) = value.as_object() else { return Ok(()) };
    for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !all.contains_key(name) {
            return fail(&format!("{name} is missing"));
        }
    }
    for (name, item) in all {
        let at = format!("{at}/{name}");
        match (&schema["properties"][name], &schema["additionalProperties"]) {
            (Value::Null, Value::Null | Value::Bool(true)) => {}
            (Value::Null, Value::Bool(false)) => return Err(format!("{at}: not in the document")),
            (Value::Null, more) => check(document, more, item, &at)?,
            (one, _) => check(document, one, item, &at)?,
        }
    }
    Ok(())
}

#[test]
fn the_table_and_the_document_have_the_same_routes() {
    let document = document();
    let mut told = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            assert!(told.insert((method.to_uppercase(), path.clone())));
            let route =
                ROUTES.iter().find(|r| r.path == path && r.method.as_str().eq_ignore_ascii_case(method));
            let route = route.unwrap_or_else(|| panic!("no route for {method} {path}"));
            let none = Vec::new();
            let parameters = operation["parameters"].as_array().unwrap_or(&none);
            let named = |place: &str| -> BTreeSet<&str> {
                let here = parameters.iter().filter(|parameter| parameter["in"] == place);
                here.map(|parameter| parameter["name"].as_str().unwrap()).collect()
            };
            assert_eq!(named("query"), route.query.iter().copied().collect(), "{path}");
            let arg = path.split_once('{').map(|(_, rest)| rest.trim_end_matches('}'));
            assert_eq!(named("path"), arg.into_iter().collect(), "{path}");
            let content = operation["requestBody"]["content"].as_object();
            let kind = content.and_then(|content| content.keys().next()).map(String::as_str);
            let brings = match route.brings {
                Brings::Nothing => None,
                Brings::Json => Some("application/json"),
                Brings::Bytes => Some("application/octet-stream"),
            };
            assert_eq!(kind, brings, "{path}");
        }
    }
    let table: BTreeSet<_> =
        ROUTES.iter().map(|r| (r.method.as_str().to_owned(), r.path.to_owned())).collect();
    assert_eq!(table, told);
}

/// Answers that every operation may give.
const ALWAYS: [u16; 3] = [400, 500, 503];

/// Asks, and checks status, kind and body against the document.
fn try_one(machine: &Case, method: &str, path: &str, pattern: &str, body: &str) -> u16 {
    let document = document();
    let answer = if body.is_empty() { machine.ask(method, path, "", b"") } else { machine.post(path, body) };
    let responses = &document["paths"][pattern][method.to_lowercase()]["responses"];
    assert!(responses.is_object(), "{method} {pattern}");
    let response = match &responses[answer.status.to_string()] {
        Value::Null if ALWAYS.contains(&answer.status) => &document["components"]["responses"]["Refused"],
        Value::Null => panic!("{method} {path}: {} is not in the document: {answer:?}", answer.status),
        response => resolve(&document, response),
    };
    let content = response["content"].as_object().unwrap();
    let (kind, content) = content.iter().next().unwrap();
    assert_eq!(answer.kind(), kind, "{method} {path}");
    let schema = &content["schema"];
    let fits = match kind.as_str() {
        "application/json" if pattern == "/openapi.json" => Ok(()),
        "application/json" => check(&document, schema, &answer.json(), path),
        "application/x-ndjson" => answer
            .body
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .try_for_each(|line| check(&document, schema, &serde_json::from_slice(line).unwrap(), path)),
        _ => Ok(()),
    };
    assert_eq!(fits, Ok(()), "{method} {path}");
    answer.status
}

#[test]
fn every_route_answers_as_the_document_says() {
    let machine = Case::new(SLEEPS, "2");
    // Several requests for each route: those that go well, and those that are refused.
    let plan: [(&str, &str, &str, &str, u16); 40] = [
        ("GET", "/openapi.json", "/openapi.json", "", 200),
        ("GET", "/info", "/info", "", 200),
        ("GET", "/info?x=1", "/info", "", 400),
        ("GET", "/stats", "/stats", "", 200),
        ("GET", "/metrics", "/metrics", "", 200),
        ("GET", "/inspect", "/inspect", "", 200),
        ("GET", "/inspect/vcpus/1/registers", "/inspect/{path}", "", 200),
        ("GET", "/inspect/no/such", "/inspect/{path}", "", 404),
        ("GET", "/vcpus", "/vcpus", "", 200),
        ("GET", "/vcpus/1", "/vcpus/{index}", "", 200),
        ("GET", "/vcpus/2", "/vcpus/{index}", "", 404),
        ("GET", "/vcpus/-1", "/vcpus/{index}", "", 404),
        ("GET", "/memory", "/memory", "", 200),
        ("GET", "/memory/0x100020?size=3", "/memory/{gpa}", "", 200),
        ("GET", "/memory/0x100020?size=9999999", "/memory/{gpa}", "", 400),
        ("GET", "/memory/0xffffffff", "/memory/{gpa}", "", 404),
        ("GET", "/memory/here", "/memory/{gpa}", "", 400),
        ("POST", "/pause", "/pause", "", 200),
        ("POST", "/pause", "/pause", "", 200),
        ("GET", "/vcpus", "/vcpus", "", 200),
        ("POST", "/resume", "/resume", r#"{"clock":"sideways"}"#, 400),
        ("POST", "/resume", "/resume", r#"{"clock":1}"#, 400),
        ("POST", "/resume", "/resume", r#"{"time":"freeze"}"#, 400),
        ("POST", "/resume", "/resume", r#"{"clock":"step:1s"}"#, 200),
        ("POST", "/resume", "/resume", "", 200),
        ("GET", "/events?follow=false", "/events", "", 200),
        ("GET", "/events?follow=false&past=1", "/events", "", 200),
        ("GET", "/events?follow=perhaps", "/events", "", 400),
        ("GET", "/events?past=-1", "/events", "", 400),
        ("GET", "/events?past=1&past=2", "/events", "", 400),
        ("GET", "/console", "/console", "", 200),
        ("GET", "/console?past=5", "/console", "", 200),
        ("POST", "/console", "/console", "", 200),
        ("POST", "/nmi", "/nmi", r#"{"vcpu":2}"#, 400),
        ("POST", "/stop", "/stop", r#"{"how":"gently"}"#, 400),
        ("POST", "/stop", "/stop", r#"{"how":"button"}"#, 200),
        ("POST", "/stop", "/stop", "[", 400),
        ("POST", "/nmi", "/nmi", r#"{"vcpu":1}"#, 200),
        ("POST", "/reset", "/reset", "", 200),
        ("POST", "/stop", "/stop", r#"{"how":"now"}"#, 200),
    ];
    let mut seen = BTreeSet::new();
    for (method, path, pattern, body, want) in plan {
        assert_eq!(try_one(&machine, method, path, pattern, body), want, "{method} {path} {body}");
        seen.insert((method, pattern));
        if pattern == "/reset" {
            super::until("the next life", || machine.control.status() == wardian_machine::Status::Running);
        }
    }
    seen.insert(("GET", "/wait")); // see `uses`
    for route in &ROUTES {
        assert!(
            seen.contains(&(route.method.as_str(), route.path)),
            "{} {} is not tried",
            route.method,
            route.path
        );
    }
    machine.end();
}

#[test]
fn the_check_of_schemas_can_fail() {
    let document = document();
    let done = serde_json::json!({ "$ref": "#/components/schemas/Done" });
    let fits = |text: &str| check(&document, &done, &serde_json::from_str(text).unwrap(), "").is_ok();
    assert!(fits(r#"{"status":"paused","changed":true}"#));
    for wrong in [
        r#"{"status":"paused"}"#,
        r#"{"status":"lost","changed":true}"#,
        r#"{"status":"paused","changed":1}"#,
        r#"{"status":"paused","changed":true,"more":1}"#,
        "[]",
    ] {
        assert!(!fits(wrong), "{wrong}");
    }
}
