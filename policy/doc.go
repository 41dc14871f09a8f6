// Package policy asks Rego policies whether a capability may be granted.
//
// The host and each partition have an engine. An engine is a revision of Rego
// and one worker process that compiles and evaluates it: the program's own
// binary, run again as WorkerMain, confined before it reads any policy. OPA
// cannot be bounded inside a process, so no policy is ever parsed, compiled or
// evaluated in the process that calls this package.
//
// # Laws
//
//   - Whatever is not an answer denies, and says which: an error, a timeout, a
//     wrong shape, a worker that ended, an engine without a revision.
//   - Combine is the only place where answers become one. It is pure.
//   - Engines share no lock that a request holds. What one policy does to its
//     worker, no other engine's decision waits for.
//   - A revision in force is replaced only by one that compiled, in a worker of
//     its own. The last good sources are kept, so that a worker can be started
//     again.
//   - A worker holds nothing: no file, network, privilege, or way to start a
//     process. It dies with the broker, and after any request it did not answer
//     well.
//   - What a policy may say and read is fixed in a few tables here: answers,
//     limitNames, allowedBuiltins, schema/input.json. What can be seen to break
//     them is an error at load with a file and a line.
//   - Nothing here knows the ledger, or what a kind of capability means.
//
// # The wire
//
// frame.go describes it. The first request confines the worker, the next loads;
// then each decision is one frame each way. The worker's words are bounded,
// parsed strictly, and never more than an answer.
package policy
