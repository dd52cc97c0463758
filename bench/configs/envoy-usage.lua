-- Reads the model out of each request and the usage out of each answer, and leaves them in the
-- stream's metadata, where the access logger that counts finds them.
local byte, find, match, sub = string.byte, string.find, string.match, string.sub

-- Reads every usage in whole lines of text; a later one replaces an earlier one.
local function read_usages(seen, text)
  local at = find(text, '"usage"', 1, true)
  while at do
    local stop = find(text, "\n", at, true) or #text
    local found = sub(text, at, stop)
    seen.input = match(found, '"input_tokens"%s*:%s*(%d+)') or seen.input
    seen.read = match(found, '"cache_read_input_tokens"%s*:%s*(%d+)') or seen.read
    seen.write = match(found, '"cache_creation_input_tokens"%s*:%s*(%d+)') or seen.write
    seen.output = match(found, '"output_tokens"%s*:%s*(%d+)') or seen.output
    at = find(text, '"usage"', stop, true)
  end
end

local function leave(seen, handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set("usage", "input", tonumber(seen.input) or 0)
  metadata:set("usage", "read", tonumber(seen.read) or 0)
  metadata:set("usage", "write", tonumber(seen.write) or 0)
  metadata:set("usage", "output", tonumber(seen.output) or 0)
end

function envoy_on_request(handle)
  local body = handle:body()
  local model = body and match(body:getBytes(0, body:length()), '"model"%s*:%s*"([^"]*)"')
  handle:streamInfo():dynamicMetadata():set("usage", "model", model or "unknown")
end

function envoy_on_response(handle)
  local kind = match(handle:headers():get("content-type") or "", "^[^;]*")
  if kind == "application/json" then
    local seen = {}
    local body = handle:body()
    if body then read_usages(seen, body:getBytes(0, body:length())) end
    leave(seen, handle)
  elseif kind == "text/event-stream" then
    -- Only a line that a chunk does not end is kept.
    local seen, kept = {}, ""
    for chunk in handle:bodyChunks() do
      local text = chunk:getBytes(0, chunk:length())
      if kept ~= "" then text = kept .. text end
      read_usages(seen, text)
      kept = (text == "" or byte(text, -1) == 10) and "" or sub(text, match(text, ".*\n()") or 1)
    end
    leave(seen, handle)
  end
end
