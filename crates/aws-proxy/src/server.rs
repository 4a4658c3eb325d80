//! The server: passes on, counts, disturbs.

use crate::caller::Caller;
use crate::calls::{ASK_FOR_CAPACITY, Called, Count, Operation, capacity, reads};
use crate::refusal::{Refusal, response};
use crate::rules::{Call, Effect, Rule, State};
use anyhow::Result;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{ConnectInfo, Request, State as Shared, connect_info::Connected};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Response, header};
use axum::routing::get;
use axum::serve::IncomingStream;
use axum::{Json, Router};
use futures_util::{future::ready, stream};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;

/// More than any API takes.
const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;

/// Serves each listener with what is behind it, until one fails.
pub async fn serve(forwards: Vec<(TcpListener, SocketAddr)>) -> Result<()> {
    // The proxy speaks plain HTTP only, but its client wants to be told how it would encrypt.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let log = Arc::new(Log::default());
    let client = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build()?;
    let mut servers = tokio::task::JoinSet::new();
    for (listener, behind) in forwards {
        let proxy = Proxy { log: log.clone(), client: client.clone(), behind };
        let router = Router::new()
            .route("/_proxy/rules", get(rules).post(add_rules).delete(delete_rules))
            .route("/_proxy/calls", get(calls).delete(delete_calls))
            .fallback(forward)
            .with_state(proxy)
            .into_make_service_with_connect_info::<Connection>();
        servers.spawn(async move { axum::serve(listener, router).await });
    }
    while let Some(ended) = servers.join_next().await {
        ended??;
    }
    Ok(())
}

#[derive(Default)]
struct Log {
    rules: Mutex<Vec<State>>,
    calls: Mutex<BTreeMap<(Option<String>, Operation), Count>>,
}

#[derive(Clone)]
struct Proxy {
    log: Arc<Log>,
    client: reqwest::Client,
    behind: SocketAddr,
}

/// A connection, with whoever is at its other end once somebody has asked.
#[derive(Clone)]
struct Connection {
    from: u16,
    to: u16,
    caller: Arc<OnceLock<Option<Caller>>>,
}

impl Connected<IncomingStream<'_, TcpListener>> for Connection {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let to = stream.io().local_addr().map_or(0, |address| address.port());
        Self { from: stream.remote_addr().port(), to, caller: Arc::default() }
    }
}

impl Connection {
    fn caller(&self) -> Option<&Caller> {
        self.caller.get_or_init(|| Caller::of_connection(self.from, self.to)).as_ref()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn rules(Shared(proxy): Shared<Proxy>) -> Json<Vec<State>> {
    Json(lock(&proxy.log.rules).clone())
}

async fn add_rules(Shared(proxy): Shared<Proxy>, Json(rules): Json<Vec<Rule>>) {
    lock(&proxy.log.rules).extend(rules.into_iter().map(State::from));
}

async fn delete_rules(Shared(proxy): Shared<Proxy>) {
    lock(&proxy.log.rules).clear();
}

async fn calls(Shared(proxy): Shared<Proxy>) -> Json<Vec<Called>> {
    let calls = lock(&proxy.log.calls);
    let line = |((function, operation), count): (&(Option<String>, Operation), &Count)| Called {
        function: function.clone(),
        operation: operation.clone(),
        count: count.clone(),
    };
    Json(calls.iter().map(line).collect())
}

async fn delete_calls(Shared(proxy): Shared<Proxy>) {
    lock(&proxy.log.calls).clear();
}

/// Passes a call on, unless a rule is against it.
async fn forward(
    Shared(proxy): Shared<Proxy>,
    ConnectInfo(connection): ConnectInfo<Connection>,
    request: Request,
) -> Response<Body> {
    let (head, body) = request.into_parts();
    let Ok(body) = to_bytes(body, MAX_BODY_BYTES).await else { return broken() };
    let operation = Operation::of(&head.method, &head.uri, &head.headers, &body);
    let caller = connection.caller();
    let function = caller.map(|caller| caller.function.as_str());
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let call = Call { function, operation: &operation, path, body: &body };
    let effect = lock(&proxy.log.rules).iter_mut().find_map(|rule| rule.effect(&call));
    let mut count = Count { calls: 1, ..Count::default() };

    let answer = match effect {
        Some(Effect::Throttle) => response(Refusal::Throttled, &operation, &head.headers),
        Some(Effect::Unavailable) => response(Refusal::Unavailable, &operation, &head.headers),
        Some(Effect::KillBefore) => {
            end(caller);
            broken()
        }
        Some(Effect::KillAfter) => {
            proxy.pass(&operation, &head, body, &mut count).await;
            end(caller);
            broken()
        }
        Some(Effect::LoseAnswer) => {
            proxy.pass(&operation, &head, body, &mut count).await;
            broken()
        }
        Some(Effect::Delay(milliseconds)) => {
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
            proxy.pass(&operation, &head, body, &mut count).await
        }
        None => proxy.pass(&operation, &head, body, &mut count).await,
    };
    count.refused = u64::from(answer.status().is_client_error() || answer.status().is_server_error());
    let key = (function.map(str::to_owned), operation);
    let mut calls = lock(&proxy.log.calls);
    let sum = calls.entry(key).or_default();
    sum.calls += count.calls;
    sum.refused += count.refused;
    sum.read_units += count.read_units;
    sum.write_units += count.write_units;
    answer
}

/// As a power cut ends it.
fn end(caller: Option<&Caller>) {
    if let Some(caller) = caller {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(caller.pid), Signal::SIGKILL);
    }
}

/// An answer in whose middle the connection breaks: the caller must take it for none.
fn broken() -> Response<Body> {
    let error = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let body = Body::from_stream(stream::once(ready(Err::<Bytes, _>(error))));
    Response::builder().header(header::CONTENT_LENGTH, 1).body(body).unwrap_or_default()
}

impl Proxy {
    /// Has the call carried out; what it costs is added to the count.
    async fn pass(&self, operation: &Operation, head: &Parts, body: Bytes, count: &mut Count) -> Response<Body> {
        let is_dynamodb = operation.service == "dynamodb";
        let mut headers = head.headers.clone();
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::TRANSFER_ENCODING);
        if is_dynamodb {
            headers.insert(ASK_FOR_CAPACITY, HeaderValue::from_static("TOTAL"));
        }
        let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
        let request = self.client.request(head.method.clone(), format!("http://{}{path}", self.behind));
        let request = request.headers(headers).body(body);
        let Ok(answer) = request.send().await else { return broken() };
        let mut passed = Response::builder().status(answer.status());
        if let Some(headers) = passed.headers_mut() {
            headers.extend(answer.headers().clone());
            headers.remove(header::TRANSFER_ENCODING);
            headers.remove(header::CONNECTION);
        }
        let Ok(bytes) = answer.bytes().await else { return broken() };
        if is_dynamodb {
            let units = if reads(operation) { &mut count.read_units } else { &mut count.write_units };
            *units += capacity(&bytes);
        }
        passed.body(Body::from(bytes)).unwrap_or_default()
    }
}
