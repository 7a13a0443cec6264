import { render } from "preact";
import { Page } from "./page";
import "./style.css";
import "./pages.css";

render(<Page />, document.body);
